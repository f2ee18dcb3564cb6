"""Every golden vector, through the product."""
import json

import pytest

import handlers
from handlers import CannotRebuild, NOT_YET, handler_for, left_for_later, load_handlers, older_behaviour, parse_options, first_word


def test_golden(case, verdict):
    stage = left_for_later(case)
    if stage:
        verdict("not yet")
        pytest.skip(f"not yet: {case.keys[-1]} belongs to a later issue on {stage}")
    handler = handler_for(case.word)
    assert handler, f"no handler for {case.word!r} (function: {case.function}); add one in tests/parity/handlers/"
    try:
        handler(case)
    except CannotRebuild as reason:
        verdict("cannot be rebuilt", str(reason))
        pytest.skip(f"cannot be rebuilt: {reason}")
    except AssertionError:
        if not older_behaviour(case): raise
        verdict("cannot be rebuilt", reason := f"behaviour of {', '.join(case.commits)} alone, which no protocol follows")
        pytest.skip(f"cannot be rebuilt: {reason}")
    verdict("checked")


def test_nothing_that_is_covered_waits_on_the_list():
    "An entry of NOT_YET whose handler (or converter) exists hides a check: take it off the list."
    from tulu_study.data import converters
    covered = (set(NOT_YET) & set(load_handlers())) | (set(NOT_YET) & set(converters()))
    assert not covered, f"on the NOT_YET list although covered: {sorted(covered)}"


@pytest.mark.parametrize("function, word, options", [
    ("convert_cot_data(num_zero_shot_examples=2,num_few_shot_examples=0)", "convert_cot_data",
     {"num_zero_shot_examples": 2, "num_few_shot_examples": 0}),
    ('encode_instruction_example(eos_token="</s>")', "encode_instruction_example", {"eos_token": "</s>"}),
    ("eval.gsm.run_eval.main max_num_examples=3 of 5, n_shot=3", "eval.gsm.run_eval.main",
     {"max_num_examples": 3, "n_shot": 3}),
    ("encode_instruction_example(random_template=False)", "encode_instruction_example", {"random_template": False}),
])
def test_options_are_read_from_the_function(function, word, options):
    assert (first_word(function), parse_options(function)) == (word, options)


@pytest.mark.parametrize("words, found", [
    ("gsm/direct/chat", ("direct", "paper", True, None, None, None)), ("gsm/no_cot/plain/max_num_examples=50", ("direct", "paper", False, None, 50, None)),
    ("gsm/cot/0shot/all", ("cot", "paper", False, 0, "all", None)), ("bbh/cot/chat/per_task=5", ("cot", "paper", True, None, None, 5)),
    ("mmlu/5-shot/chat", ("5shot", "paper", True, None, None, None)), ("mmlu/ntrain=0/plain/n_instances=100", ("0shot", "paper", False, None, None, 100)),
    ("mmlu/5shot/n_shot=3", ("5shot", "paper", False, 3, None, None)), ("tydiqa/no_context/plain/max_num_examples_per_lang=10", ("closed_book", "paper", False, None, None, 10)),
    ("codex_eval/chat", ("t0.1", "paper", True, None, None, None)), ("mgsm/fixed/plain/n_shot=2", ("cot", "fixed", False, 2, None, None)),
    ("toxigen/chat/max_prompts_per_group=100", ("default", "paper", True, None, None, 100)), ("truthfulqa/mc/plain", ("mc", "paper", False, None, None, None)),
])
def test_mirror_keys_say_which_prompts_are_meant(words, found):
    handlers.load_handlers()
    from handlers.evaluation import prompts_asked
    key, *parts = words.split("/")
    asked = prompts_asked(key, parts)
    assert tuple(asked[name] for name in ("setting", "protocol", "chat", "n_shot", "n", "per_group")) == found


@pytest.mark.parametrize("words", ["gsm/plain", "gsm/cot/v1", "tydiqa/gold_passage/xlingual"])
def test_mirror_keys_that_say_too_little_or_too_much(words):
    handlers.load_handlers()
    from handlers.evaluation import prompts_asked
    key, *parts = words.split("/")
    with pytest.raises(CannotRebuild, match="setting|is no setting"): prompts_asked(key, parts)


@pytest.mark.skipif(not (handlers.USUAL_GOLDEN / handlers.VECTORS).is_file() or not handlers.USUAL_MIRROR.is_dir(), reason="the usual golden vectors are not on this machine")
def test_vectors_that_speak_of_others_rows_are_rebuilt_without_those_others(tmp_path, monkeypatch):
    "Alone in a file of their own: the rows come from the usual file."
    ours = ("eval.mmlu.eval_hf_model", "eval.gsm.run_eval.main", "eval.tydiqa.run_eval.main")
    alone = [v for group in handlers.golden(handlers.VECTORS, handlers.USUAL_GOLDEN).values() if isinstance(group, list) for v in group if v["input"] is None and first_word(v["function"]) in ours]
    assert {first_word(v["function"]) for v in alone} == set(ours)
    (tmp_path / handlers.VECTORS).write_text(json.dumps({"elsewhere": alone}))
    monkeypatch.setattr(handlers, "GOLDEN", tmp_path)
    found = list(handlers.cases())
    assert len(found) == len(alone)
    for case in found: handler_for(case.word)(case)


def test_output_of_another_state_of_the_reference_alone_is_no_failure():
    of = lambda function, *commits: older_behaviour(handlers.Case(handlers.VECTORS, "x", "x", function, commits=list(commits)))
    assert of("eval.gsm.run_eval.main (HF path)", "13404e37a") and of("eval.tydiqa.run_eval.main", "4a2e9dd0c")
    assert not of("eval.gsm.run_eval.main", "13404e37a", handlers.PAPER) and not of("eval.gsm.run_eval.main")
    assert not of("eval.mgsm.run_eval.main", "13404e37a") and not of("convert_oasst1_data", "13404e37a") and not of("scripts/weight_diff.py make_diff", "13404e37a")
