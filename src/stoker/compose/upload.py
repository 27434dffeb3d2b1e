"""The trained weights to the Hub, when a run is over."""

from pathlib import Path

from rich.console import Console

from stoker.errors import TrainingError


def upload(weights: Path, repository: str, *, revision: str | None, console: Console) -> str:
    """Uploads the folder of the tuned weights to a repository of the Hub, made private where there is none; returns it.

    Raises:
        TrainingError: it cannot be reached, or the login may not write to it; the weights stay where they are.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi()
    try:
        with console.status(f"uploading to {repository}"):
            api.create_repo(repository, private=True, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=weights, revision=revision, commit_message="Tuned weights, by Stoker"
            )
    # What the Hub's client raises for refusals and for a network that is not there are both errors of the system.
    except (OSError, HFValidationError) as error:
        raise TrainingError(
            f"the weights in {weights} could not be uploaded to {repository}: {str(error).splitlines()[0]}",
            fix=f"Log in with `hf auth login` and run: hf upload {repository} {weights}",
        ) from error
    return repository
