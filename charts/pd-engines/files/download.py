import os, pathlib, sys

from huggingface_hub import snapshot_download

model, revision, done = sys.argv[1], sys.argv[2] or None, pathlib.Path(sys.argv[3])
try:
    print(f"downloading {model}", flush=True)
    folder = snapshot_download(model, revision=revision)
except Exception as error:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        sys.exit(f"{model} is gated: ask for access on its page, and name a Secret with your token in huggingFace.existingSecret ({status})")
    sys.exit(f"{model} cannot be downloaded: {type(error).__name__}: {error}")
done.parent.mkdir(exist_ok=True)
done.touch()
print(f"{model} is in {os.path.relpath(folder, '/model-cache')}", flush=True)
