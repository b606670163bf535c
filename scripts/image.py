"""Assemble the router's image where no container engine runs, look through it, start it.

    image.py build FILE.tar            assemble it as an archive that containerd and Docker import;
                                       with --of simulator that of the simulated engines
    image.py unpack FILE.tar FOLDER    lay out its root file system and its configuration
    image.py check FOLDER              say what does not belong into it; status 1 when there is something
    image.py run FOLDER ARG…           start its entry point as its user, with a root file system that it cannot write

What is in an image is read from its Dockerfile: the entry point, user, variables and labels of the last stage, and the
folder that scripts/router_layer.sh (simulator_layer.sh) fills. The base image consists of Debian 12's packages; the
same are fetched by apt-get, which neither installs them nor needs root.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PYTHON = "python3.11"
Fill = Callable[[pathlib.Path], None]  # puts a layer's files into a folder
TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
IMAGES = ("router", "simulator")

BASE_PACKAGES = (
    "base-files netbase tzdata ca-certificates "
    "libc6 libssl3 libgcc-s1 libgomp1 libstdc++6 "
    "libbz2-1.0 libcom-err2 libcrypt1 libdb5.3 libexpat1 libffi8 libgssapi-krb5-2 libk5crypto3 libkeyutils1 libkrb5-3 "
    "libkrb5support0 liblzma5 libncursesw6 libnsl2 libreadline8 libsqlite3-0 libtinfo6 libtirpc3 libuuid1 zlib1g "
    "libpython3.11-minimal libpython3.11-stdlib python3.11-minimal python3-distutils"
).split()
"""Debian packages of distroless' python3-debian12."""

FORBIDDEN = re.compile(
    r"(^|/)(bin|sbin)/(sh|bash|dash|busybox|apt|apt-get|dpkg|gcc|cc|c\+\+|g\+\+|ld|as|make|git|curl|wget|pip3?|uv|perl)$"
    r"|/site-packages/(pip|setuptools|wheel|mypy|mypyc)/|^opt/pd-router/(pip|setuptools|wheel|mypy|mypyc|pytest|pdctl|pdsim)/"
    r"|\.(a|h|deb)$|(^|/)\.git/"
)
"""What an image that only runs the router has no use for."""


class ImageError(Exception):
    """The image cannot be made or started here; the message says why and what to do."""


def last_stage(of: str) -> dict[str, Any]:
    """Give an image's configuration as the last stage of its Dockerfile says it."""
    text = re.sub(r"\\\n", " ", (ROOT / of / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    start = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    told: dict[str, Any] = {"Env": [f"PATH={path}", "LANG=C.UTF-8", f"SSL_CERT_FILE={TRUSTED}"]}
    for line in lines[start + 1 :]:
        word, rest = line.split(maxsplit=1)
        if word == "ENV":
            told["Env"] += shlex.split(rest)
        elif word == "LABEL":
            told["Labels"] = dict(part.split("=", 1) for part in shlex.split(rest))
        elif word == "USER":
            told["User"] = rest
        elif word == "WORKDIR":
            told["WorkingDir"] = rest
        elif word == "EXPOSE":
            told["ExposedPorts"] = {f"{port}/tcp": {} for port in rest.split()}
        elif word == "ENTRYPOINT":
            told["Entrypoint"] = json.loads(rest)
        elif line != f"COPY --from=build /opt/pd-{of} /opt/pd-{of}":
            raise ImageError(f"{of}/Dockerfile has an instruction that scripts/image.py does not know: {line}")
    by_name = {one.partition("=")[0]: one for one in told["Env"]}
    return told | {"Env": list(by_name.values())}


def tag(of: str) -> str:
    """Give the name of an image, with the version as its tag."""
    found = re.search(r'^version = "(.+)"', (ROOT / of / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return f"localhost/pd-{of}:{found[1]}"


def cache() -> pathlib.Path:
    """Give the folder for what is fetched or built once."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pdctl/image"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process of this user fills the cache, and keep it for oneself."""
    with (cache() / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command: str | pathlib.Path, cwd: pathlib.Path | None = None) -> str:
    """Run a command and give what it prints.

    Raises:
        ImageError: it is not there or fails.
    """
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ImageError(f"there is no {command[0]} on this machine") from None
    if done.returncode != 0:
        raise ImageError(f"{command[0]} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def base(into: pathlib.Path) -> None:
    """Unpack the base image's packages.

    Raises:
        ImageError: they cannot be had.
    """
    release = pathlib.Path("/etc/os-release").read_text() if pathlib.Path("/etc/os-release").exists() else ""
    if "VERSION_CODENAME=bookworm" not in release:
        raise ImageError("the base image is made of Debian 12's packages, and this machine is no Debian 12")
    # A state of its own: the machine's package lists are neither needed nor touched.
    state = cache() / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    options = [
        f"Dir::State::Lists={state / 'lists'}", f"Dir::Cache={state}", f"Dir::Cache::Archives={state / 'archives'}",
        "APT::Sandbox::User=",
    ]  # fmt: skip
    apt = ["apt-get", "-qq", *(part for option in options for part in ("-o", option))]
    run(*apt, "update")
    debs = state / "debs"
    debs.mkdir(exist_ok=True)
    wanted = [shlex.split(line)[1] for line in run(*apt, "download", "--print-uris", *BASE_PACKAGES).splitlines()]
    if any(not (debs / name).exists() for name in wanted):
        run(*apt, "download", *BASE_PACKAGES, cwd=debs)
    for name in wanted:
        run("dpkg-deb", "-x", debs / name, into)
    for unused in ("doc", "man", "locale", "lintian", "bug", "menu"):
        shutil.rmtree(into / "usr/share" / unused, ignore_errors=True)
    for alias in ("python", "python3"):
        (into / "usr/bin" / alias).unlink(missing_ok=True)
        (into / "usr/bin" / alias).symlink_to(PYTHON)
    (into / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"
        "nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n"
    )
    (into / "etc/group").write_text("root:x:0:\nnobody:x:65534:\ntty:x:5:\nstaff:x:50:\nnonroot:x:65532:\n")
    (into / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    trusted = sorted((into / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    (into / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
    (into / TRUSTED.lstrip("/")).write_bytes(b"".join(path.read_bytes() for path in trusted))
    (into / "home/nonroot").mkdir(parents=True, exist_ok=True)
    (into / "tmp").mkdir(exist_ok=True)
    (into / "tmp").chmod(0o1777)


def application(of: str, into: pathlib.Path) -> None:
    """Copy the folder of the router or the simulator, built anew when what it is made of has changed.

    Raises:
        ImageError: it cannot be built.
    """
    python = shutil.which(PYTHON, path="/usr/bin") or shutil.which(PYTHON)
    if python is None:
        raise ImageError(f"there is no {PYTHON}, the image's Python; install it with its headers (Debian: python3-dev)")
    script = ROOT / f"scripts/{of}_layer.sh"
    digest = hashlib.sha256()
    sources = [path for path in sorted((ROOT / of).rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    for path in (*sources, script):
        digest.update(path.read_bytes())
    exported = ("export", "--quiet", "--frozen", "--package", f"pd-{of}", "--no-emit-workspace", "--no-dev")
    digest.update(run(ROOT / ".venv/bin/uv", *exported, cwd=ROOT).encode())
    built = cache() / f"{of}-{digest.hexdigest()[:16]}-{platform.machine()}"
    if not built.exists():
        print(f"image: building the {of} (a minute)", file=sys.stderr)
        work = pathlib.Path(tempfile.mkdtemp(prefix=f".{of}-", dir=cache()))
        try:
            run("bash", script, work / "layer", python)
            (work / "layer").rename(built)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(built, into / f"opt/pd-{of}", symlinks=True)


def layer(folder: pathlib.Path) -> bytes:
    """Pack a folder so that the same files give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            info = archive.gettarinfo(str(path), name)
            owner = 65532 if name.startswith("home/nonroot") else 0
            info.uid = info.gid = owner
            info.uname = info.gname = ""
            info.mtime = 0
            if info.isfile():
                with path.open("rb") as file:
                    archive.addfile(info, file)
            else:
                archive.addfile(info)
    return buffer.getvalue()


@functools.cache
def _base_layer() -> bytes:
    return _filled(base)


def _filled(fill: Fill) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        fill(pathlib.Path(folder))
        return layer(pathlib.Path(folder))


def build(target: pathlib.Path, of: str = "router", further: dict[str, Fill] | None = None) -> None:
    """Assemble an image into an archive.

    Args:
        target: the archive.
        of: what it holds.
        further: what fills further layers, by what is said of them.

    Raises:
        ImageError: it cannot be done here.
    """
    with alone():
        fill = functools.partial(application, of)
        layers = {"Debian packages": _base_layer(), f"scripts/{of}_layer.sh": _filled(fill)}
    layers |= {what: _filled(fill) for what, fill in (further or {}).items()}
    pack(target, tag(of), last_stage(of), layers)


def pack(target: pathlib.Path, named: str, config: dict[str, Any], layers: dict[str, bytes]) -> None:
    """Write an archive of an image from its layers, each a tar file, by what made them."""
    diffs = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers.values()]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    image = json.dumps({
        "architecture": machine, "os": "linux", "created": "1970-01-01T00:00:00Z", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diffs},
        "history": [{"created_by": made_by} for made_by in layers],
    }, sort_keys=True).encode()  # fmt: skip
    config_name = hashlib.sha256(image).hexdigest() + ".json"
    names = [f"{diff.removeprefix('sha256:')}/layer.tar" for diff in diffs]
    manifest = [{"Config": config_name, "RepoTags": [named], "Layers": names}]
    files = {
        config_name: image,
        **dict(zip(names, layers.values(), strict=True)),
        "manifest.json": json.dumps(manifest).encode(),
    }
    with tarfile.open(target, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def unpack(source: pathlib.Path, into: pathlib.Path) -> None:
    """Lay out an image: `root`, its file system, and `config.json`."""
    root = into / "root"
    root.mkdir(parents=True)
    with tarfile.open(source) as archive:
        read = {member.name: archive.extractfile(member) for member in archive}
        manifest = json.load(read["manifest.json"] or io.BytesIO())[0]
        config = json.load(read[manifest["Config"]] or io.BytesIO())["config"]
        (into / "config.json").write_text(json.dumps(config))
        for name in manifest["Layers"]:
            with tarfile.open(fileobj=read[name]) as layer:
                layer.extractall(root, filter="tar")


def problems(folder: pathlib.Path) -> list[str]:
    """Give what does not belong into an image that was laid out, a line each."""
    found = []
    root = folder / "root"
    config = json.loads((folder / "config.json").read_text())
    user = config.get("User", "")
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user):
        found.append(f"USER is {user or 'root'}: give numbers other than 0, since Kubernetes cannot check a name")
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if FORBIDDEN.search(name):
            found.append(f"{name} has no use in the image")
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            found.append(f"{name} runs as another user")
        if not stat.S_ISLNK(mode) and mode & stat.S_IWOTH and name != "tmp":
            found.append(f"{name} can be written by everybody")
    if not (root / config["Entrypoint"][0].lstrip("/")).is_file():
        found.append(f"the entry point {config['Entrypoint'][0]} is not there")
    sbom = config.get("Labels", {}).get("org.pdctl.sbom", "")
    if not sbom or not (root / sbom.lstrip("/")).is_file():
        found.append(f"the label org.pdctl.sbom names no file: {sbom!r}")
        return found
    listed = {one["name"] for one in json.loads((root / sbom.lstrip("/")).read_text())["components"]} | {"pd-router"}
    for path in sorted((root / "opt/pd-router").glob("*.dist-info")):
        name = re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower()
        if name not in listed:
            found.append(f"{name} is installed, but the SBOM does not list it")
    return found


def start(
    folder: pathlib.Path, arguments: list[str], entry_point: str | None, mounts: list[str], variables: list[str]
) -> None:
    """Start a program of an image that was laid out, as a container engine would; never returns.

    The root file system is read-only but for /tmp; /dev is the machine's.

    Args:
        folder: the image.
        arguments: what follows the entry point.
        entry_point: a program of the image instead of its entry point.
        mounts: `HOST:INSIDE`, folders to mount.
        variables: `NAME=VALUE`, beside the image's own.

    Raises:
        ImageError: this machine cannot do it.
    """
    root = folder.resolve() / "root"
    config = json.loads((folder / "config.json").read_text())
    inside = [("/dev", "/dev"), *((host, at) for host, _, at in (mount.partition(":") for mount in mounts))]
    for _, at in inside:
        (root / at.lstrip("/")).mkdir(parents=True, exist_ok=True)
    steps = [
        ["mount", "--bind", f"{root}", f"{root}"], ["mount", "-o", "remount,bind,ro", f"{root}"],
        ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/tmp"],
        *(["mount", "--rbind", host, f"{root}{at}"] for host, at in inside),
    ]  # fmt: skip
    am_root = os.geteuid() == 0
    program = [entry_point] if entry_point else config["Entrypoint"]
    change = ["chroot", *(["--userspec", config["User"]] if am_root else []), f"{root}", *program, *arguments]
    steps.append(["exec", "env", "-i", *config["Env"], *variables, *change])
    namespaces = ["--mount", "--propagation", "private", *([] if am_root else ["--map-root-user"])]
    try:
        os.execvp("unshare", ["unshare", *namespaces, "sh", "-c", " && ".join(shlex.join(step) for step in steps)])
    except FileNotFoundError:
        raise ImageError("there is no unshare on this machine (Debian: util-linux)") from None


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="The router's image, without a container engine.")
    commands = parser.add_subparsers(dest="what", required=True)
    building = commands.add_parser("build")
    building.add_argument("--of", choices=IMAGES, default=IMAGES[0])
    building.add_argument("archive", type=pathlib.Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("archive", type=pathlib.Path)
    unpacking.add_argument("folder", type=pathlib.Path)
    commands.add_parser("check").add_argument("folder", type=pathlib.Path)
    running = commands.add_parser("run")
    running.add_argument("--entry-point", metavar="PROGRAM")
    running.add_argument("--mount", action="append", default=[], metavar="HOST:INSIDE")
    running.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    running.add_argument("folder", type=pathlib.Path)
    running.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG")
    told = parser.parse_args()
    try:
        if told.what == "build":
            build(told.archive, told.of)
        elif told.what == "unpack":
            unpack(told.archive, told.folder)
        elif told.what == "run":
            start(told.folder, told.arguments, told.entry_point, told.mount, told.env)
        else:
            found = problems(told.folder)
            print("\n".join(found) or f"{told.folder}: nothing in it that does not belong there")
            return int(bool(found))
    except ImageError as error:
        print(f"image: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
