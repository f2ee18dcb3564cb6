"""The Tülu paper (Wang et al. 2023) as a living, executable study: data, training, evaluation, tables and figures

Modules:

- `tulu_study.core.cells`: One cell of the study: one papermill execution of one run notebook, checked before, recorded after.
- `tulu_study.core.grid`: The set of cells that a study file asks for: names, notebooks, parameters, folders, what needs what, and the state of each.
- `tulu_study.data.streams`: Files that grow while a conversion runs, and the conversion of large files on several cores.
- `tulu_study.evaluation.endpoint`: An engine for models that others run: any address that speaks OpenAI's completions or chat protocol, a vLLM server included.
- `tulu_study.evaluation.engines`: Engines: what turns prompts into completions and option log-probabilities.
- `tulu_study.evaluation.runner`: The runner: one checkpoint, all its benchmarks, one engine start, results that survive a kill.
- `tulu_study.evaluation.sandbox`: The sandbox for generated code: run a program against its tests without trusting one line of it.
- `tulu_study.evaluation.sandbox_inside`: What runs inside the sandbox: a checker, and the program that it checks in a process of its own.
- `tulu_study.evaluation.standalone`: One model, any benchmarks, no study: what `tulu-study evaluate MODEL` does.
- `tulu_study.planning`: What a study will cost before anything is spent: tokens, memory per GPU, hours, money and disk of every fine-tuning, and in total.
- `tulu_study.reporting.copying`: Copy finished tables and figures out of the results, each with a provenance record, so that a second copy changes no byte.
- `tulu_study.training.finetune`: The process that trains, one per rank: `python -m tulu_study.training.finetune settings.json`.
- `tulu_study.training.lora`: Low-rank adaptation: train small matrices beside frozen weights, and merge them into an ordinary checkpoint at the end.
- `tulu_study.training.resume`: The state of a fine-tuning on disk, so that the same command continues where a killed one stood.
- `tulu_study.training.store`: Encoded conversations on disk: made once, by the first rank, and mapped by all of them."""

__version__ = "0.1.0"
