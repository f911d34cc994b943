"""Files of a model hub's repositories, at a given revision."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import pathlib
import re
import urllib.parse

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from rlft.types import UserError

# The hub's own references, such as those of pull requests, have slashes.
_REFERENCE = re.compile(r"refs/[\w.-]+/[\w.-]+")
_ID = re.compile(
  rf"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>{_REFERENCE.pattern}|[\w.%-]+)(/(?P<file>.+))?)?"
)


class UnreachableError(UserError):
  """A file is not in the cache, and the hub cannot be asked for it."""


def parse(source: str) -> "Repository | None":
  """'org/name', 'org/name@revision' or 'org/name@revision/file'; None if it is none of these.

  A revision may be 'refs/pr/11'; any other slash in it is written %2F, as in the hub's addresses.
  """
  if (match := _ID.fullmatch(source)) is None:
    return None
  revision = match["revision"] and urllib.parse.unquote(match["revision"])
  return Repository(match["repo"], revision, match["file"])


def offline() -> bool:
  """Whether the user wants no hub to be asked (HF_HUB_OFFLINE): then the cache is all there is."""
  return constants.HF_HUB_OFFLINE


@dataclasses.dataclass(frozen=True)
class Repository:
  """A repository at a revision (a commit hash, tag or branch) and, maybe, a file in it."""

  repo: str
  revision: str | None
  file: str | None

  def __str__(self) -> str:
    if self.revision is None or _REFERENCE.fullmatch(self.revision):
      return "@".join(filter(None, (self.repo, self.revision)))
    return f"{self.repo}@{urllib.parse.quote(self.revision, safe='')}"

  def fetch(self, name: str) -> pathlib.Path | None:
    """Downloads a file, or takes it from the cache; None if the repository has none so called.

    Raises:
      UnreachableError: it is not in the cache, and the hub cannot be reached.
      UserError: the hub refuses.
    """
    try:
      with _quiet():
        path = huggingface_hub.hf_hub_download(self.repo, name, revision=self.revision)
      return pathlib.Path(path)
    except errors.LocalEntryNotFoundError as error:
      cached = huggingface_hub.try_to_load_from_cache(self.repo, name, revision=self.revision)
      # Its documentation has callers compare with this name, underscore and all.
      if cached is huggingface_hub._CACHED_NO_EXIST:
        return None  # The hub said so when it was last asked.
      raise UnreachableError(
        f"{self}: {name} is not in the cache, and the hub cannot be reached; download it where "
        "there is a network, and give the directory"
      ) from error
    except errors.EntryNotFoundError:
      return None
    except errors.GatedRepoError as error:
      raise UserError(
        f"{self}: the hub asks for its terms to be accepted; do so on its page, and log in with "
        "'hf auth login'"
      ) from error
    except errors.RevisionNotFoundError as error:
      raise UserError(
        f"{self}: the repository has no revision {self.revision!r}; correct it"
      ) from error
    except errors.RepositoryNotFoundError as error:
      raise UserError(
        f"{self}: the hub has no repository {self.repo!r} (or it is private); correct the name, "
        "or log in with 'hf auth login'"
      ) from error
    # Errors of the transport come through, too: of requests, httpx or httpx2, by the hub's release.
    except Exception as error:
      cause = " ".join(str(error).split())[:200] or type(error).__name__
      raise UserError(
        f"{self}: {name} cannot be downloaded ({cause}); try again, or give a directory"
      ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without the hub's lines about each of its attempts: the error says what came of them."""
  level = hub_logging.get_verbosity()
  hub_logging.set_verbosity_error()
  try:
    yield
  finally:
    hub_logging.set_verbosity(level)


def check_upload(repo: str) -> None:
  """Checks what can be checked of `upload` before there is anything to be uploaded.

  Raises:
    UserError: no name of a repository, or nobody is logged in.
  """
  parsed = parse(repo)
  if parsed is None or parsed.revision is not None:
    raise UserError(f"--push_to_hub={repo} is no name of a hub's repository: write org/name")
  try:
    validate_repo_id(repo)
  except ValueError as error:
    raise UserError(
      f"--push_to_hub={repo} is no name of a hub's repository ({error}): write org/name"
    ) from error
  if huggingface_hub.get_token() is None:
    raise UserError(
      f"--push_to_hub={repo}: nobody is logged in to the hub; do so with 'hf auth login', or set"
      " HF_TOKEN to a token that may write"
    )


def upload(repo: str, contents: Mapping[str, pathlib.Path | bytes]) -> str:
  """Uploads files in one commit; makes the repository, which everybody can read, if there is none.

  Args:
    repo: 'org/name'.
    contents: what each file is called in the repository, and where or what it is.

  Returns:
    The address of the repository.

  Raises:
    UserError: the hub refuses or cannot be reached.
  """
  api = huggingface_hub.HfApi()
  operations = [
    huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
    for name, content in contents.items()
  ]
  try:
    with _quiet():
      made = api.create_repo(repo, exist_ok=True)
      api.create_commit(repo, operations, commit_message="Add a model that rlft has fine-tuned")
  # Errors of the transport come through, too: of requests, httpx or httpx2, by the hub's release.
  except Exception as error:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
      raise UserError(
        f"--push_to_hub={repo}: the hub refuses the token ({status}); log in with 'hf auth login',"
        " or set HF_TOKEN to a token that may write there"
      ) from error
    cause = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f"--push_to_hub={repo}: it cannot be uploaded ({cause}); what was written here is intact, try"
      " again"
    ) from error
  return str(made)
