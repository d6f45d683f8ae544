"""The Hugging Face hub: uploading what a run has saved, and fetching a state to go on from. Needs no torch.

The client is imported where an option asks for it; it takes its server from HF_ENDPOINT.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError, first_line
from library.options.derived import hub_place
from library.options.groups import SavingOptions, TrainNetworkOptions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

CHECK_SECONDS = 10  # to wait for the hub's answer to whether it is there
REFUSED = (401, 403)  # HTTP status of a token that is wrong or may not do this


class Uploads:
    """The uploads of a run, one after the other; with --async_upload training goes on meanwhile."""

    def __init__(self, options: SavingOptions):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # training has its own
        self.options = options
        self.api = hub_client(options)
        self.worker = ThreadPoolExecutor(max_workers=1)
        self.waiting: dict[Path, Future] = {}

    def add(self, path: Path) -> None:
        """Upload a file or folder that is whole on disk."""
        if self.options.async_upload:
            self.waiting[path] = self.worker.submit(self._upload, path)
        else:
            self._upload(path)

    def wait_for(self, path: Path) -> None:
        """Wait for the upload of this path, if there is one, before the path is removed."""
        if path in self.waiting:
            self.waiting.pop(path).result()

    def finish(self) -> None:
        """Wait for all uploads."""
        if any(not upload.done() for upload in self.waiting.values()):
            logger.info("waiting for uploads to Hugging Face")
        self.worker.shutdown()

    def _upload(self, path: Path) -> None:
        repo_id = self.options.huggingface_repo_id
        try:
            ensure_repo(self.api, self.options)
            commit = self._send(path)
        except Exception as error:  # whatever the client raises: the file is safe, and the run goes on
            logger.warning("%s was not uploaded to %s, but is safe on disk: %s", path, repo_id, first_line(error))
        else:
            logger.info("uploaded: %s", commit.commit_url)

    def _send(self, path: Path):
        folder = (self.options.huggingface_path_in_repo or "").strip("/")
        place = {
            "path_in_repo": f"{folder}/{path.name}" if folder else path.name,
            "repo_id": self.options.huggingface_repo_id,
            "repo_type": self.options.huggingface_repo_type,
        }
        if path.is_dir():
            return self.api.upload_folder(folder_path=path, **place)
        return self.api.upload_file(path_or_fileobj=path, **place)


def hub_client(options: SavingOptions) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(token=options.huggingface_token)


def ensure_repo(api: "HfApi", options: SavingOptions) -> None:
    """Make the repository where there is none, private unless it is to be public; any error of the client."""
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id, repo_type = options.huggingface_repo_id, options.huggingface_repo_type
    try:
        api.repo_info(repo_id, repo_type=repo_type, timeout=CHECK_SECONDS)
    except RepositoryNotFoundError:
        private = options.huggingface_repo_visibility != "public"
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)


def check_uploads(options: SavingOptions) -> None:
    """UserError where no upload could succeed; where the hub is out of reach, a warning, since it may come back."""
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    repo_id = options.huggingface_repo_id
    if not options.huggingface_token and get_token() is None:
        raise UserError(
            "--huggingface_repo_id: uploading needs an access token; give --huggingface_token, "
            "set HF_TOKEN, or run `hf auth login` once"
        )
    if is_offline_mode():
        logger.warning("--huggingface_repo_id: uploads will fail while HF_HUB_OFFLINE is set; unset it to upload")
        return
    api = hub_client(options)
    try:
        ensure_repo(api, options)
        api.auth_check(repo_id, repo_type=options.huggingface_repo_type, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise UserError(
                f"--huggingface_repo_id: the token may not write to {repo_id}: {first_line(error)}"
            ) from error
        logger.warning("--huggingface_repo_id: %s cannot be prepared now: %s", repo_id, first_line(error))
    except Exception as error:  # whatever the client raises without a network
        logger.warning("--huggingface_repo_id: Hugging Face is out of reach now: %s", first_line(error))


def fetch_state(options: TrainNetworkOptions) -> Path:
    """The state folder that --resume names on the hub, downloaded into the hub's cache."""
    from huggingface_hub import is_offline_mode, snapshot_download

    place = hub_place(options.resume)
    if is_offline_mode():
        raise UserError("--resume_from_huggingface: nothing can be downloaded while HF_HUB_OFFLINE is set; unset it")
    where = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
    logger.info("fetching the state %s", options.resume)
    try:
        hub_client(options).repo_info(**where, timeout=CHECK_SECONDS)
        snapshot = snapshot_download(**where, allow_patterns=f"{escape(place.path)}/*", token=options.huggingface_token)
    except Exception as error:  # whatever the client raises
        raise UserError(f"--resume {options.resume}: it cannot be downloaded: {first_line(error)}") from error
    folder = Path(snapshot) / place.path
    if not folder.is_dir():
        raise UserError(f"--resume {options.resume}: {place.repo_id} has no folder {place.path}")
    return folder
