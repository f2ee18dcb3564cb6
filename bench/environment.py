"""Packages that a benchmark compares with lie in folders of their own below .bench/, never in the project's environment.

A folder is filled once by pip, without dependencies: what these packages need besides is in the project's environment already, which stays on the path after them.
"""
import shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def side_folder(
    name: str,  # of the folder
    requirements: list,  # for pip, each with its version
    described: dict | None = None,  # distributions that are there under another name: name -> version under which the peer looks for them
) -> Path:  # to be put in front of PYTHONPATH
    "A folder with the packages; SystemExit with pip's last line where they cannot be had."
    folder, wanted = ROOT / ".bench" / name, "\n".join([*requirements, *map(str, (described or {}).items())])
    stamp = folder / "requirements.txt"
    if stamp.is_file() and stamp.read_text() == wanted: return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(part), *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"pip could not install {requirements[0]}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    for found, version in (described or {}).items():
        facts = part / f"{found}-{version}.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {found}\nVersion: {version}\n")
    (part / stamp.name).write_text(wanted)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
