"""Downloads a model into the cache of $HF_HOME and, when all of it is there, makes a file that says so."""

import os
import pathlib
import sys

from huggingface_hub import snapshot_download

model, revision, done = sys.argv[1], sys.argv[2] or None, pathlib.Path(sys.argv[3])
print(f"downloading {model}", flush=True)
try:
    folder = snapshot_download(model, revision=revision)
except Exception as error:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        sys.exit(
            f"{model} is not given to this token ({status}): ask for access on the model's page, and name a Secret "
            "with your token in huggingFace.existingSecret"
        )
    sys.exit(f"{model} cannot be downloaded: {type(error).__name__}: {error}")
done.parent.mkdir(parents=True, exist_ok=True)
done.touch()
print(f"{model} is in {os.path.relpath(folder, os.environ['HF_HOME'])}", flush=True)
