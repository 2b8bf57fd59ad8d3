"""Operations of a pipeline put in order, for given costs and memory: the one engine that does."""
