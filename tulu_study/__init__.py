"""The Tülu paper (Wang et al. 2023) as a living, executable study: data, training, evaluation, tables and figures

Modules:

- `tulu_study.core.cells`: One cell of the study: one papermill execution of one run notebook, checked before, recorded after.
- `tulu_study.core.grid`: The set of cells that a study file asks for: names, notebooks, parameters, folders, what needs what, and the state of each.
- `tulu_study.evaluation.engines`: Engines: what turns prompts into completions and option log-probabilities.
- `tulu_study.evaluation.runner`: The runner: one checkpoint, all its benchmarks, one engine start, results that survive a kill.
- `tulu_study.reporting.copying`: Copy finished tables and figures out of the results, each with a provenance record, so that a second copy changes no byte.
- `tulu_study.training.finetune`: The process that trains, one per rank: `python -m tulu_study.training.finetune settings.json`."""

__version__ = "0.1.0"
