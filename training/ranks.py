"""Several trainer processes in one driver: the first one's work handed to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from runtime.errors import UserError

T = TypeVar("T")


class ElsewhereError(UserError):
    """The first process could not go on, so neither can this one."""


class BrokenOffError(UserError):
    """A process broke off where the others are not with it: nothing that takes them all can follow, such as saving."""


@contextmanager
def rank_local(accelerator: Accelerator) -> Iterator[None]:
    """Within it a UserError may be this process's only: with several it becomes a BrokenOffError."""
    try:
        yield
    except UserError as error:
        if accelerator.num_processes == 1:
            raise
        raise BrokenOffError(f"{type(error).__name__} in process {accelerator.process_index}: {error}") from error


def run_on_main(accelerator: Accelerator | PartialState, work: Callable[[], T]) -> T:
    """What `work` returns on the first process, on every process (pickled). Nothing else runs it.

    An error there is raised on all: the others would wait for ever. It is an ElsewhereError there after a UserError,
    which leaves all of them where they can still save together, and else a BrokenOffError.
    """
    if accelerator.num_processes == 1:
        return work()
    error: Exception | None = None
    box: list = [None, "", False]
    if accelerator.is_main_process:
        try:
            box[0] = work()
        except Exception as raised:
            error, box[1:] = raised, [f"{type(raised).__name__}: {raised}", isinstance(raised, UserError)]
    broadcast_object_list(box)
    if error is not None:
        raise error
    if box[1]:
        raise (ElsewhereError if box[2] else BrokenOffError)(box[1])
    return box[0]


def signal_anywhere(accelerator: Accelerator, number: int) -> int:
    """The signal that some process has received, the same on all; 0: none has. Collective.

    A batch system may send it to one process alone, or to them all at different steps.
    """
    if accelerator.num_processes == 1:
        return number
    numbers = torch.tensor([number], device=accelerator.device)
    return int(accelerator.gather(numbers).max())  # type: ignore[union-attr]
