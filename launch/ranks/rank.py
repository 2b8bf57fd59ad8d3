"""The life of a forked rank: output, meeting place, work, answer."""

import faulthandler
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from phalanx.launch.ranks.failure import Failure
from phalanx.launch.ranks.logs import redirect


def rank_main(
    answer_fd: int,
    stdout_fd: int,
    stderr_fd: int,
    *,
    rank: int,
    plan: dict[str, Any],
    work: tuple[bytes, dict[str, Any] | None],
    log_dir: Path | None,
    around: tuple[dict[str, str], str, list[str]],
) -> None:
    """Run the pickled `work` as one rank of `plan`, and answer through `answer_fd`.

    The answer is a line with the meeting place of the ranks, then a pickled mapping that holds
    `result` or `failure`. `around` is the launching process's environment, folder and sys.path.
    """
    for source, target in ((stdout_fd, 1), (stderr_fd, 2)):
        os.dup2(source, target)
        os.close(source)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    environ, folder, sys.path[:] = around
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    log = redirect(rank=rank, log_dir=log_dir)
    faulthandler.enable(log or sys.stderr)
    with open(answer_fd, "wb", closefd=False) as answer:
        try:
            result = _work(answer, rank=rank, plan=plan, work=work)
            body = pickle.dumps({"result": result})
        except BaseException as error:
            body = pickle.dumps({"failure": Failure.caught(error, rank=rank, log=log)})
        sys.stdout.flush()
        sys.stderr.flush()
        answer.write(body)


def _work(
    answer: Any, *, rank: int, plan: dict[str, Any], work: tuple[bytes, dict[str, Any] | None]
) -> Any:
    from phalanx.parallel.ranks import Ranks

    if "init_method" not in plan:
        _store, plan = _open_store(plan)
    answer.write(plan["init_method"].encode() + b"\n")
    answer.flush()
    if work[1] is not None:
        from multiprocessing.spawn import prepare

        prepare(work[1])
    fn, args = pickle.loads(work[0])
    return fn(Ranks(rank=rank, local_rank=rank, local_world_size=plan["world_size"], **plan), *args)


def _open_store(plan: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Rank 0 listens on a port that the kernel picks, so that no other run can take it first.

    The store is multi-tenant: `init_process_group` finds it running in this process and joins it.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    return store, plan | {"init_method": f"tcp://127.0.0.1:{store.port}"}
