# make study   set up the environment and run a study (STUDY=nano by default; SOURCES=<folder of raw files>)
# make test    set up and run everything that CI runs
# make plan | report | lab | figures | doctor | system-deps | resolve-gpu | clean
# make bench-data   how fast conversion is, as ratios against named opponents (SOURCES=<folder of raw files> and TOKENIZER=<folder of LLaMA's tokenizer, default $(SOURCES)/tokenizers/llama> for ShareGPT)
# make bench-train  how fast fine-tuning is on a CPU, as ratios against named opponents (SOURCES = folder of raw files with tokenizers/llama; about half an hour on two idle cores)
# make bench-gpu    what fine-tuning takes on one GPU, beside the plan's prediction (SOURCES = folder of raw files with tokenizers/llama)
# make bench-agreement   whether vLLM and transformers say the same on 50 examples of every benchmark setting (SOURCES; writes bench/agreement.md)
# make bench-sandbox     how fast generated code is checked: 164 problems, 20 completions each (SOURCES; needs bubblewrap)
# make bench-eval   how fast evaluation is on a CPU, as ratios against named opponents (SOURCES = folder of raw files with gsm8k and mmlu)

STUDY ?= nano
PYTHON ?= python3
VENV ?= .venv
# LLaMA's tokenizer, for timing ShareGPT's splitting: beside the raw files
TOKENIZER ?= $(if $(SOURCES),$(wildcard $(SOURCES)/tokenizers/llama))
# set-up is complete when this stamp is newer than the packaging files
READY := $(VENV)/.ready
BIN := $(VENV)/bin

ifdef SOURCES
export TULU_SOURCES := $(shell realpath -m "$(SOURCES)")
endif
ifdef RESULTS
export TULU_RESULTS := $(shell realpath -m "$(RESULTS)")
endif
# a study started by make ends with make
export TULU_TIED := 1

.PHONY: study plan report lab test check figures doctor setup system-deps resolve-gpu clean readme bench-data bench-train bench-eval
.DEFAULT_GOAL := study

study: setup
	@$(BIN)/tulu-study run $(STUDY)
	@$(BIN)/tulu-study figures $(STUDY)

plan: setup
	@$(BIN)/tulu-study plan $(STUDY)

# where to look: the tables in the terminal, the rest as paths
report: setup
	@$(BIN)/tulu-study report $(STUDY)

figures: setup
	@$(BIN)/tulu-study figures $(STUDY)

doctor: setup
	@$(BIN)/tulu-study doctor

lab: setup
	@$(BIN)/python -m ipykernel install --sys-prefix --name tulu-study --display-name "Python (tulu_study)"
	@$(BIN)/jupyter lab --notebook-dir . $$([ "$$(id -u)" = 0 ] && echo --allow-root)

test: setup system-deps-if-root
	@$(BIN)/python tests/gate.py

setup: $(READY)

$(READY): pyproject.toml setup.py tools/setup_env.sh
	@PYTHON="$(PYTHON)" bash tools/setup_env.sh "$(VENV)"

# Debian packages that features need: bubblewrap (sandbox of generated code), g++ (the setting `compile`; offloading the optimiser on GPU machines)
DEBIAN := bubblewrap g++
system-deps:
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 $(DEBIAN) >/dev/null

.PHONY: system-deps-if-root
system-deps-if-root:
	@missing=""; for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then $(MAKE) --no-print-directory system-deps; \
	else echo "Not installed:$$missing. The tests that need them are skipped; to install: sudo make system-deps"; fi

# whether the `gpu` extra and the tools resolve together, without installing anything (minutes: pip reads what each candidate needs)
resolve-gpu: setup
	@$(BIN)/python -m pip install --dry-run --ignore-installed --quiet --no-warn-script-location --report "$(VENV)/gpu.json" ".[gpu,dev]"
	@$(BIN)/python -c "import json; found = {p['metadata']['name'].lower(): p['metadata']['version'] for p in json.load(open('$(VENV)/gpu.json'))['install']}; \
	print(len(found), 'packages, among them', ', '.join(f'{name} {found[name]}' for name in ('torch', 'vllm', 'transformers', 'deepspeed', 'datasets', 'bitsandbytes')))"

bench-data: setup
	@missed=0; $(BIN)/python bench/data.py || missed=1; \
	$(if $(TOKENIZER),$(BIN)/python bench/sharegpt.py --tokenizer "$(TOKENIZER)" $(if $(SOURCES),--source "$(SOURCES)") || missed=1,echo "ShareGPT's splitting is timed with LLaMA's tokenizer: make bench-data TOKENIZER=<folder with tokenizer.json and tokenizer.model> [SOURCES=…]"); exit $$missed

bench-train: setup
	@$(BIN)/python bench/train.py --check

.PHONY: bench-gpu bench-agreement bench-sandbox
bench-gpu: setup
	@$(BIN)/python bench/gpu.py

bench-agreement: setup
	@$(BIN)/python bench/agreement.py

bench-sandbox: setup
	@$(BIN)/python bench/sandbox.py

bench-eval: setup
	@$(BIN)/python bench/eval.py --check

readme: setup
	@$(BIN)/python tools/readme.py

clean:
	rm -rf results/$(STUDY)
