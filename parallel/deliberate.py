"""Which errors are messages, and which are defects whose traceback counts. Torch-free."""

import dis

RAISE = dis.opmap["RAISE_VARARGS"]


def is_deliberate(error: BaseException) -> bool:
    """Whether a `raise` statement of this project made the error, and so its text.

    Not so what a library raises, however deep, or an operation of ours on what it cannot take
    (int("x"), a wrong shape), or an assertion.
    """
    where = error.__traceback__
    if where is None or isinstance(error, AssertionError):
        return False
    while where.tb_next is not None:
        where = where.tb_next
    frame = where.tb_frame
    ours = str(frame.f_globals.get("__name__")).startswith("phalanx.")
    return ours and frame.f_code.co_code[where.tb_lasti] == RAISE
