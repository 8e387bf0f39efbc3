"""Every error a user can meet, in one place.

Each message says what was wrong, where (table, feature, id, rank, file and line) and what to do about it. Errors found on one
rank while a batch is being routed travel to all ranks with the counts message, so that every rank raises the same one: they are
rebuilt on the other side from their class name and text alone.
"""

from __future__ import annotations

# What several errors of ranks that went different ways advise.
SAME_CALLS = "Every rank must make the same calls in the same order, also in evaluation and with an empty batch"
SAME_OUTPUTS = (
    "The losses of the ranks do not use the same outputs: let every loss use all of them (add 0 * output.sum() where one does not "
    "matter), or look them up together (a collection, or shard(..., inputs=...))"
)


class ShardEmbedError(Exception):
    """Base of all errors raised by shardembed."""


class ConfigError(ShardEmbedError, ValueError):
    """A setting (a table, an optimizer, a configuration file) is wrong."""


class UnsupportedError(ShardEmbedError, NotImplementedError):
    """A valid request that this version cannot serve."""


class PlanError(ShardEmbedError, ValueError):
    """A plan does not fit the tables, the ranks, or the optimizer."""


class DisagreementError(ShardEmbedError):
    """Ranks of one job were given different tables, plans or calls."""


class CollectiveError(ShardEmbedError, RuntimeError):
    """A collective call did not complete: it timed out, or a rank is gone."""


class NonFiniteError(ShardEmbedError, ArithmeticError):
    """A loss, a table or a parameter holds inf or nan and the policy is to raise. `places`: where, in words."""

    places: tuple[str, ...] = ()


class NonFiniteGradientError(NonFiniteError):
    """A gradient holds inf or nan and the policy is to raise."""


class StepError(ShardEmbedError, RuntimeError):
    """A training step was put together in the wrong order."""


class PickleError(ShardEmbedError, TypeError):
    """A sharded table was about to be pickled."""


class DataError(ShardEmbedError, ValueError):
    """A data file or one of its rows is unusable."""


class LoaderError(DataError):
    """The data loader of another rank failed."""


class WorkerError(ShardEmbedError, RuntimeError):
    """A worker process that reads data ended before its time, or cannot hand over what it read."""


class EndOfData(ShardEmbedError):
    """A rank has no more batches: no error, and none that users meet."""


class CheckpointError(ShardEmbedError, RuntimeError):
    """A checkpoint cannot be written, or is missing, damaged, altered, from a newer version or of another model."""


class ExportError(ShardEmbedError, RuntimeError):
    """An export or a picture cannot be written, or a number does not fit the dtype that it should have there."""


class InputError(ShardEmbedError, ValueError):
    """A batch is malformed. Raised on every rank when it happens on one."""


class IdRangeError(InputError, IndexError):
    """An id is negative or not below `num_embeddings`."""


class OffsetsError(InputError):
    """The offsets of a ragged feature do not describe its ids."""


class DtypeError(InputError, TypeError):
    """A tensor of a batch has the wrong dtype or type."""


class FeatureError(InputError, KeyError):
    """A batch lacks a feature, or has one that no table knows."""

    def __str__(self) -> str:  # KeyError would show the repr of the text
        return str(self.args[0])


class UnusedBatchWarning(UserWarning):
    """The ids of batches were sent ahead, and the model was called with others."""


class StaleReferenceWarning(UserWarning):
    """Something still refers to a plain table that has been sharded."""


class StillLearningWarning(UserWarning):
    """All Parameters beside sharded tables have been frozen, one by one, and the tables learn on."""


class NonFiniteWarning(UserWarning):
    """A checkpoint holds inf or nan."""


class NoRoomWarning(UserWarning):
    """A checkpoint has more ids of a dynamic table than find room in it."""


class MissedStepWarning(UserWarning):
    """Gradients of more backward passes than asked for are waiting for a step."""


_TRAVELLING = {
    cls.__name__: cls
    for cls in (
        *(InputError, IdRangeError, OffsetsError, DtypeError, FeatureError, ConfigError, DataError, CheckpointError),
        *(LoaderError, EndOfData, WorkerError, ExportError, UnsupportedError),
    )
}
# A rank that has no batch to give is heard before one whose batch nobody will look at.
_PRECEDENCE = {LoaderError.__name__: 0, EndOfData.__name__: 1}


def travels(error: Exception) -> tuple[str, str]:
    """How the other ranks hear of `error`: a class name and a text for `rebuild`."""
    name = type(error).__name__
    return (name, str(error)) if name in _TRAVELLING else (InputError.__name__, f"{name}: {error}")


def rebuild(name: str, text: str) -> ShardEmbedError:
    """The error that another rank sent: its class name and its text."""
    return _TRAVELLING.get(name, InputError)(text)


def precedence(name: str) -> int:
    """Of the errors that several ranks tell at once, the one whose class comes first is raised."""
    return _PRECEDENCE.get(name, len(_PRECEDENCE))
