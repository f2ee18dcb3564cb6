"""A real pretrained model, as small as they come, through the engine that takes it."""
import pytest

from handlers import MIRROR


def test_stories260K_tells_a_story():
    "Head size 8 is too small for vLLM's CPU attention: this one is for transformers."
    folder = MIRROR / "models" / "stories260K"
    if not folder.is_dir(): pytest.skip("the mirror's models/stories260K is not on this machine (TULU_MIRROR)")
    from tulu_study.evaluation.engines import TransformersEngine
    engine = TransformersEngine(folder)
    told, cut = (engine.generate(["Once upon a time, there was a little girl named"], 40, stop=stop)[0] for stop in ([], ["."]))
    assert engine.bos == "one" and told.finish == ["length"] and told.completion_tokens == 40 and len(told.texts[0].split()) > 10
    assert cut.texts == [told.texts[0].split(".")[0]] and cut.completion_tokens < 40
