#!/usr/bin/env bash
# Make the environment in $1: all that the study, its tests and JupyterLab need on a CPU machine, or with GPUs (EXTRA=gpu).
# Safe to repeat; an interrupted set-up continues.
set -euo pipefail
venv=${1:-.venv}
python=${PYTHON:-python3}
if [ -z "${EXTRA:-}" ]; then if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then EXTRA=gpu; else EXTRA=cpu; fi; fi
log="$venv/setup.log"

"$python" - <<'PY' || { echo "Set PYTHON to another interpreter: make study PYTHON=python3.11" >&2; exit 1; }
import sys
if not (3, 10) <= sys.version_info[:2] < (3, 13): sys.exit(f"Python 3.10 to 3.12 is needed, found {sys.version.split()[0]} at {sys.executable}.")
PY
[ "$EXTRA" = cpu ] || command -v g++ >/dev/null || echo "Note: g++ was not found; the setting compile and DeepSpeed's offloading of the optimiser need it (apt-get install g++ python3-dev)." >&2

echo "Setting up $venv ($EXTRA): about 4 GB and a minute or two, once. Log: $log"
mkdir -p "$venv"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv" || {
  echo "A virtual environment could not be made with $python. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; }
fail() { tail -n 15 "$log" >&2; echo "Set-up failed; the whole log is $log. The same command continues." >&2; exit 1; }

: >"$log"
pip install --upgrade "pip>=25" || fail        # the resolver of older pips takes very long over these pins
want=".[$EXTRA,dev]"
# PyTorch's CPU build is on its own index; on some sites the plain index has it. Ask the plain index first: an index that cannot be reached is retried for every package.
if ! pip install --prefer-binary -e "$want"; then
  [ "$EXTRA" = cpu ] || fail
  echo "The plain package index has no fitting torch; trying PyTorch's CPU index as well"
  pip install --prefer-binary --extra-index-url https://download.pytorch.org/whl/cpu -e "$want" || fail
fi
# torchvision, torchaudio and torchcodec come along with vLLM. Where their build does not match torch's, importing transformers fails; the study is text only and does without them.
if ! "$venv/bin/python" -c "import torchvision" >/dev/null 2>&1; then pip uninstall -y torchvision torchaudio torchcodec || true; fi
"$venv/bin/python" -c "import transformers, papermill, snakemake" >>"$log" 2>&1 || fail
touch "$venv/.ready"
