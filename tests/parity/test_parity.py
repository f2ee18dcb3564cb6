"""Every golden vector, through the product."""
import pytest

from handlers import CannotRebuild, NOT_YET, handler_for, left_for_later, load_handlers, parse_options, first_word


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
