"""Copy finished tables and figures out of the results, each with a provenance record, so that a second copy changes no byte.

Results are not under version control, `figures/<study>/` is. What goes there must depend on nothing but what was computed: the provenance record of an artefact therefore
keeps the keys, parameters, code hashes, package versions, commit and inputs of the cells behind it, and leaves out dates, seconds, machines and folders."""
import json
import re
from pathlib import Path

from tulu_study.core.cells import missing_outputs, read_manifest, science
from tulu_study.core.files import hash_json, write_atomic
from tulu_study.reporting.figures import published_figure
from tulu_study.reporting.tables import published_tables

SUFFIXES = (".md", ".csv", ".svg", ".png")
KEY = re.compile(r"[0-9a-f]{16}")


class CopyError(RuntimeError):
    "Something in the results cannot be copied as it stands."


def manifests(
    results_dir: Path,  # results/<study>
) -> dict[str, dict]:   # a cell's key -> its manifest, with its folder's name under "place"
    "The manifests of all finished cells of a study."
    found = {}
    for path in sorted(results_dir.rglob("manifest.json")):
        manifest = read_manifest(path.parent)
        if manifest and "key" in manifest:
            found[manifest["key"]] = manifest | {"place": path.parent.relative_to(results_dir).as_posix()}
    return found


def strings(value) -> set[str]:
    "Every string in a JSON value."
    if isinstance(value, str):
        return {value}
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return set().union(*map(strings, parts)) if parts else set()


def cells_behind(
    manifest: dict,            # of a table or figure
    known: dict[str, dict],    # as `manifests` gives them
) -> list[str]:                # keys, the artefact's own first, then in the order of their places
    "The cell of an artefact and every cell that it depends on, as far as the manifests name each other's keys in their inputs."
    queue, seen = [manifest["key"]], set()
    while queue:
        key = queue.pop()
        if key in seen:
            continue
        seen.add(key)
        inputs = (manifest if key == manifest["key"] else known[key]).get("inputs", {})
        queue += sorted(name for name in strings(inputs) if KEY.fullmatch(name) and name in known)
    return [manifest["key"], *sorted(seen - {manifest["key"]}, key=lambda key: known[key]["place"])]


def portable(value):
    "A JSON value without machines' folders: an absolute path is cut to its last part."
    if isinstance(value, dict):
        return {name: portable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [portable(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") and "\n" not in value else value


def record(
    manifest: dict,   # of any cell
) -> dict:
    "The part of a manifest that says what was computed, without when, where and how fast. The versions of the machine's packages stand once per artefact, not here."
    return {
        "cell": manifest["place"],
        "notebook": manifest.get("notebook"),
        "key": manifest["key"],
        "code": hash_json(manifest.get("code", {}))[:16],
        "parameters": portable(science(manifest.get("parameters", {}))),
        "inputs": portable(manifest.get("inputs", {})),
        "outputs": {name: entry["sha256"] for name, entry in sorted(manifest.get("outputs", {}).items()) if isinstance(entry, dict) and "/" not in name and Path(name).suffix in SUFFIXES},
        "engine": portable(manifest.get("engine")),
        "git": manifest.get("git"),
    }


def provenance(
    manifest: dict,            # of a table or figure, with "place"
    known: dict[str, dict],    # as `manifests` gives them
) -> dict:
    "What made an artefact: its own cell in full, the cells behind it in short, all package versions that they ran with."
    own, *others = [record(known[key]) for key in cells_behind(manifest, known)]
    versions = {name: sorted({str(known[key]["versions"][name]) for key in cells_behind(manifest, known) if name in known[key].get("versions", {})}) for name in sorted(manifest.get("versions", {}))}
    short = ("cell", "notebook", "key", "code", "parameters", "engine", "git")
    return own | {"versions": {name: found[0] if len(found) == 1 else found for name, found in versions.items()}, "cells": [{name: cell[name] for name in short} for cell in others]}


def without_commit(value):
    "A provenance record without commits."
    if isinstance(value, dict):
        return {name: without_commit(part) for name, part in value.items() if name != "git"}
    return [without_commit(part) for part in value] if isinstance(value, list) else value


def provenance_text(
    found: dict,   # as `provenance` gives it
    path: Path,    # where the last record of this artefact stands, if there is one
) -> str:
    "A provenance record as text. Where the last record differs in nothing but the commit, it stands: the same code made the same artefact then, and a re-run changes no byte."
    try:
        last = path.read_text(encoding="utf-8")
        if without_commit(json.loads(last)) == without_commit(found):
            return last
    except (FileNotFoundError, ValueError):
        pass
    return json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def write_if_changed(path: Path, data: bytes) -> bool:
    "Write a file unless it already holds exactly these bytes; whether it was written."
    if path.is_file() and path.read_bytes() == data:
        return False
    write_atomic(path, data)
    return True


def copy_figures(
    results_dir: str | Path,  # results/<study>
    figures_dir: str | Path,  # figures/<study>
    leave_out=frozenset(),    # places ("tables/table1") of artefacts that are out of date
) -> list[Path]:              # every file that the copy consists of, changed or not
    """Copy all finished tables and figures of a study, each with `<name>.provenance.json`.

    An artefact is a folder below `tables/` or `figures/` with a manifest. Its files are named after the folder, so that `tables/table3-7B/table3.csv` becomes `table3-7B.csv`.
    Raises CopyError where nothing is finished, or where a file is not the one that its manifest recorded; nothing is copied then."""
    results_dir, figures_dir = Path(results_dir), Path(figures_dir)
    known = manifests(results_dir)
    wanted, problems = {}, []
    for key, manifest in known.items():
        kind, _, name = manifest["place"].partition("/")
        if kind not in ("tables", "figures") or not name or "/" in name or manifest["place"] in leave_out:
            continue
        folder = results_dir / kind / name
        for lost in missing_outputs(folder, manifest):
            problems.append(f"{manifest['place']}/{lost}: found no such file of the recorded size")
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES and path.is_file():
                target = f"{name}{path.suffix}"
                if target in wanted:
                    problems.append(f"{manifest['place']}: found two files for {target}")
                wanted[target] = path.read_bytes()
        record_name = f"{name}.provenance.json"
        wanted[record_name] = provenance_text(provenance(manifest, known), figures_dir / record_name).encode()
    if problems:
        raise CopyError("Cannot copy:\n" + "\n".join(problems) + "\nRun the study again; it rebuilds what is missing.")
    if not wanted:
        raise CopyError(f"Found no finished table or figure in {results_dir.name}/. Run the study first; `tulu-study plan` says what is missing.")
    for name, data in wanted.items():
        write_if_changed(figures_dir / name, data)
    return [figures_dir / name for name in wanted]


def write_published(
    figures_dir: str | Path,  # figures/published
) -> list[Path]:              # the files
    "Write the paper's own Tables 1 and 3 and its change figure, from `params/published` alone."
    return [*published_tables(figures_dir), *published_figure(figures_dir)]
