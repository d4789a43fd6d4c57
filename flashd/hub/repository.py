# SPDX-License-Identifier: Apache-2.0
"""Lists the files of a repository at a revision, and selects those that a model needs.

The hub's answers are untrusted: names are checked, numbers bounded, and digests compared after the download.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from flashd._version import __version__
from flashd.checkpoint.source.reader import MAX_ENTRIES, MAX_SIDE_FILE_BYTES, Index, needed_files, pooling_name
from flashd.errors import (
    FlashdError,
    InvalidArgument,
    InvalidSource,
    NotAuthorized,
    NotFound,
    TransferFailed,
    Unavailable,
)
from flashd.units import format_bytes

T = TypeVar("T")

_ANSWER_S = 30.0
_ATTEMPTS = 5
_MAX_FILE_BYTES = 1 << 44
UNKNOWN = -1  # the size of a file about which the hub does not tell enough to download it
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """A file as described by the hub: with its SHA-256, or, for a small file, with git's SHA-1.

    `cached` is its path in the user's Hugging Face cache.
    """

    name: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""
    cached: Path | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """A repository at one commit, or one of its variants (flashd/hub/variants.py)."""

    repository: str
    commit: str
    files: Mapping[str, RepositoryFile]
    variant: str = ""

    @property
    def origin(self) -> str:
        return f"{self.repository}{':' * bool(self.variant)}{self.variant}@{self.commit}"


@dataclass(frozen=True, slots=True)
class Needed:
    """The files of a revision that make a model."""

    weights: tuple[RepositoryFile, ...]
    others: tuple[RepositoryFile, ...]

    @property
    def files(self) -> tuple[RepositoryFile, ...]:
        return (*self.others, *self.weights)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def look_up(repository: str, revision: str, token: str | None) -> Revision:
    """Looks up a revision on the hub, or, offline, in the user's Hugging Face cache.

    Raises NotFound, NotAuthorized (private and gated repositories), Unavailable, InvalidArgument or InvalidSource.
    """
    api = HfApi(token=token, library_name="flashd", library_version=__version__)
    with asking(repository, revision):
        try:
            info = patiently(
                lambda: api.model_info(repository, revision=revision, files_metadata=True, timeout=_ANSWER_S)
            )
        except OfflineModeIsEnabled:
            return _cached_revision(repository, revision)
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise InvalidSource(
            f"the hub names no commit of {repository}", hint="check that HF_ENDPOINT is a Hugging Face Hub"
        )
    siblings = info.siblings or []
    if len(siblings) > MAX_ENTRIES:
        raise InvalidSource(
            f"{repository} has more than {MAX_ENTRIES} files", hint="choose a repository of a single model"
        )
    # Folders (onnx/, original/) contain other forms of the same model. Names without folders cannot leave our folder.
    found = (_file(repository, commit, sibling) for sibling in siblings if _name_of(sibling.rfilename))
    return Revision(repository, commit, {file.name: file for file in found})


def choose(revision: Revision, read_index: Callable[[RepositoryFile], Index]) -> Needed:
    """Selects the weights, preferably safetensors, and the small files that belong to them. Raises InvalidSource."""
    files = revision.files
    try:
        weights, others = needed_files(list(files), lambda name: read_index(files[name]))
    except InvalidSource as error:
        raise InvalidSource(f"{revision.repository}: {error.message}", hint=error.hint) from None
    needed = Needed(tuple(files[name] for name in weights), tuple(files[name] for name in others))
    for file in needed.files:
        if file.size_bytes == UNKNOWN:
            raise InvalidSource(f"the hub does not describe {file.name} of {revision.repository}")
    for file in needed.others:
        if file.size_bytes > MAX_SIDE_FILE_BYTES:
            raise InvalidSource(f"{file.name} of {revision.repository} is {format_bytes(file.size_bytes)}")
    return needed


@contextmanager
def asking(repository: str, revision: str) -> Iterator[None]:
    """Turns exceptions of the hub's library into our errors, without tokens in them."""
    try:
        yield
    except FlashdError:
        raise
    except GatedRepoError:
        hint = f"open {constants.ENDPOINT}/{repository}, accept its terms, then log in here: hf auth login"
        raise NotAuthorized(f"{repository} is gated: its owner must give you access", hint=hint) from None
    except RevisionNotFoundError:
        raise NotFound(f"{repository} has no revision {revision!r}", hint="leave out --revision for main") from None
    except RepositoryNotFoundError:
        hint = "check the name; if it is private, log in with an account that may read it: hf auth login"
        raise NotFound(f"the hub shows you no model {repository!r}", hint=hint) from None
    except (HFValidationError, UnicodeError):
        hint = "use OWNER/NAME, for example Qwen/Qwen3-14B"
        raise InvalidArgument(f"{repository[:100]!r} at {revision[:100]!r} cannot be on the hub", hint=hint) from None
    except OfflineModeIsEnabled:
        raise _offline(repository) from None
    except HfHubHTTPError as error:
        raise _refused(repository, error) from None
    except HTTPError as error:
        raise unreachable(error) from None
    except ValueError as error:  # an answer that is not valid JSON, a file that its library does not download
        raise TransferFailed(f"{repository}: {str(error)[:200]}") from None


def unreachable(error: Exception) -> Unavailable:
    hint = "check the network and HF_ENDPOINT, then pull again to resume"
    return Unavailable(f"the hub cannot be reached: {type(error).__name__}", hint=hint)


def patiently(ask: Callable[[], T], sleep: Callable[[float], object] = time.sleep) -> T:
    """Repeats a request a few times if the hub is temporarily unable to answer. Refusals are final."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return ask()
        except OfflineModeIsEnabled:
            raise
        except HfHubHTTPError as error:
            if not (pause_s := _retry_after_s(error, attempt)):
                raise
        except HTTPError:
            pause_s = _backoff_s(attempt)
        sleep(pause_s)
    return ask()


def _retry_after_s(error: HfHubHTTPError, attempt: int) -> float:
    """Returns the seconds to wait before a retry; 0 if a retry is useless."""
    status = error.response.status_code
    if status not in {408, 429} and status < 500:
        return 0
    wanted = error.response.headers.get("Retry-After", "")
    return min(float(wanted), 60.0) + 0.1 if wanted.isascii() and wanted.isdigit() else _backoff_s(attempt)


def _backoff_s(attempt: int) -> float:
    return 0.25 * 2.0**attempt


def _refused(repository: str, error: HfHubHTTPError) -> FlashdError:
    status = error.response.status_code
    if status == 401:
        hint = "log in again: hf auth login; a token in HF_TOKEN takes precedence"
        return NotAuthorized("the hub does not accept your token", hint=hint)
    if status == 403:
        hint = "ask its owner for access, or use a token that may read it: hf auth login"
        return NotAuthorized(f"the hub does not permit you to read {repository}", hint=hint)
    if status == 429:
        return Unavailable("the hub refuses because of too many requests", hint="pull again later to resume")
    hint = "pull again later to resume"
    return Unavailable(f"the hub answered {status} about {repository}", hint=hint)


def _cached_revision(repository: str, revision: str) -> Revision:
    """Finds a revision in the user's Hugging Face cache. Raises Unavailable if there is none."""
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision)
    except LocalEntryNotFoundError:
        config = None
    if not isinstance(config, str):
        raise _offline(repository)
    folder = Path(config).parent
    files = [
        RepositoryFile(name, path.stat().st_size, cached=path)
        for path in (*folder.iterdir(), *folder.glob("?_Pooling/config.json"))
        if path.is_file() and (name := _name_of(str(path.relative_to(folder))))
    ]
    return Revision(repository, folder.name, {file.name: file for file in files})


def _offline(repository: str) -> Unavailable:
    hint = "unset HF_HUB_OFFLINE to download it"
    return Unavailable(f"{repository} is not in your Hugging Face cache, and HF_HUB_OFFLINE is set", hint=hint)


def _name_of(path: str) -> str:
    """Returns the name of a side file; empty if the path is not one."""
    return path if _is_plain_name(path) else pooling_name(path)


def _is_plain_name(name: str) -> bool:
    return "/" not in name and name.isprintable() and name not in {"", ".", ".."} and len(name.encode()) <= 200


def _file(repository: str, commit: str, sibling: RepoSibling) -> RepositoryFile:
    name, size_bytes = _name_of(sibling.rfilename), sibling.size
    if not isinstance(size_bytes, int) or not 0 <= size_bytes <= _MAX_FILE_BYTES:
        return RepositoryFile(name, UNKNOWN)
    cached = try_to_load_from_cache(repository, sibling.rfilename, revision=commit)
    path = Path(cached) if isinstance(cached, str) else None
    if path is not None and path.stat().st_size != size_bytes:
        path = None
    sha256 = sibling.lfs.sha256 if sibling.lfs else ""
    git_sha1 = "" if sha256 else (sibling.blob_id or "")
    if not (_SHA256.fullmatch(sha256) or _COMMIT.fullmatch(git_sha1)):
        return RepositoryFile(name, UNKNOWN)
    return RepositoryFile(name, size_bytes, sha256, git_sha1, path)
