"""The errors. Every mistake of a user raises one of these; an internal invariant is an `assert`.

    PosttrainError            one line: where · what was found · what is allowed · what to do
    ├── RecipeError           a setting, a reference between stages, a command-line value
    ├── DataError             a data file or one of its rows
    ├── ModelError            a base model, its weights, its tokenizer or its chat template
    ├── AdapterError          an adapter that does not belong to this base, or is damaged
    ├── ArtifactError         a run folder, a manifest, a checkpoint
    │   ├── RunLockedError    another process works on the same run
    │   └── MovedError        a folder that this process works in was renamed or removed
    ├── JudgeError            a judge that cannot be asked or trusted, or revisions that it does not prefer
    ├── BusyError             a server has no room for a request, or is shutting down
    ├── EndpointError         a server that is asked over HTTP cannot answer, or a budget for it is used up
    └── TrainingError         training cannot continue
        └── NonFiniteError    a loss or gradient is not finite; no weight was updated

`Interrupted` is not an error: after SIGTERM or Ctrl-C the state is saved and the exit code is 0.
"""

import difflib
from collections.abc import Iterable


class PosttrainError(Exception):
    """A mistake of the user, with a message of four parts. Exit code 2."""

    def __init__(self, where: str, found: str, *, allowed: str = "", do: str = "") -> None:
        self.where, self.found, self.allowed, self.do = where, found, allowed, do
        super().__init__(" · ".join(part for part in (where, found, allowed, do) if part))


class RecipeError(PosttrainError):
    """An invalid setting or reference."""


class DataError(PosttrainError):
    """A data file, or rows of it, that cannot be used."""


class ModelError(PosttrainError):
    """A base model that cannot be loaded or used."""


class AdapterError(PosttrainError):
    """An adapter that is damaged or was trained on another base."""


class ArtifactError(PosttrainError):
    """A run folder, manifest or checkpoint that cannot be used or written."""


class RunLockedError(ArtifactError):
    """Another process is working on the same run folder."""


class MovedError(ArtifactError):
    """A folder that this process works in was renamed, removed or replaced."""


class JudgeError(PosttrainError):
    """A judge that cannot be asked or trusted, or revisions that it does not prefer."""


class BusyError(PosttrainError):
    """A server that cannot take a request now."""


class EndpointError(PosttrainError):
    """A server that is asked over HTTP and cannot answer, or whose budget is used up. Earlier replies are on disk."""


class TrainingError(PosttrainError):
    """Training cannot continue."""


class NonFiniteError(TrainingError):
    """A loss or gradient norm is not finite; the optimiser step was not taken."""


class Interrupted(Exception):
    """A stop was requested; everything so far is on disk."""


def nearest(name: str, there: Iterable[str]) -> str:
    """What to do about a misspelt name, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(there), 1)
    return f'did you mean "{close[0]}"?' if close else ""
