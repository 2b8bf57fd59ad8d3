"""Text that the model writes while it trains.

The model is any function from tokens to the logits of the next token, so the same code samples
under every layout. All ranks call `generate` together with the same arguments; as all get the
same logits and draw from generators of the same seed, all choose the same tokens.

Shapes: B batch (always 1 here), S seq_len, V vocabulary.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer

NextLogits = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""(tokens_BS int64, padded to S at the right; number of real tokens of each row) -> logits_BV of
the token after each row's last real one."""


def generate(
    next_logits: NextLogits,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    num_tokens: int,
    seq_len: int,
    temperature: float,
    seed: int,
    step: int,
    end_id: int | None = None,
) -> str:
    """`prompt` and the text that the model continues it with.

    Args:
        next_logits: the model.
        tokenizer: its tokenizer; logits past its vocabulary (padding rows) are never chosen.
        prompt: text to continue, at least one token.
        num_tokens: tokens to add.
        seq_len: width of what the model sees; of a longer text it sees the end.
        temperature: divides the logits; 0 = always the likeliest token.
        seed: training.seed; with `step` it decides every draw. Global random states stay as
            they are.
        step: steps trained so far.
        end_id: token that ends the text early; None = never.

    Raises:
        ValueError: the prompt has no tokens.
        FloatingPointError: the model's logits are not finite.
    """
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ValueError(f"monitor.sample.prompt={prompt!r}: no tokens; use at least one character")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    for _ in range(num_tokens):
        window = ids[-seq_len:]
        tokens_BS = torch.zeros(1, seq_len, dtype=torch.int64)
        tokens_BS[0, : len(window)] = torch.tensor(window)
        logits_V = next_logits(tokens_BS, [len(window)])[0].detach().to("cpu", torch.float64)
        logits_V = logits_V[: tokenizer.get_vocab_size()]
        if not torch.isfinite(logits_V).all():
            raise FloatingPointError(f"sample after step {step}: the logits are not finite")
        token = choose(logits_V, temperature=temperature, generator=generator)
        if token == end_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids))


def choose(logits_V: torch.Tensor, *, temperature: float, generator: torch.Generator) -> int:
    """A token drawn from softmax(logits / temperature), or at 0 the likeliest (the first of
    equals)."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V / temperature, dim=0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
