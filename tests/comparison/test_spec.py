"""Methods in one line."""

from __future__ import annotations

import pytest

from graftlm.comparison import METHODS, parse
from graftlm.comparison.spec import expand, merged, parse_all
from graftlm.errors import ConfigError
from graftlm.training import defaults
from graftlm.training.defaults import ALIASES, method_names


def test_options_and_recipe_paths():
    spec = parse("lora:r=16,use_dora=true,target_modules=[a, b],training.learning_rate=1e-3,training.epochs=2")
    assert spec.method == "lora"
    assert spec.options == {"r": 16, "use_dora": True, "target_modules": ["a", "b"]}
    assert spec.overrides == {"training": {"learning_rate": 1e-3, "epochs": 2}}
    assert "/" not in spec.slug and ":" not in spec.slug


def test_quantisation_is_the_recipes():
    for text, scheme in (("qlora:r=4", "nf4"), ("lora-int8:r=4", "int8"), ("lora:r=4,quantization=fp4", "fp4")):
        spec = parse(text)
        assert (spec.method, spec.options, spec.overrides) == ("lora", {"r": 4}, {"quantization": scheme})
    assert parse("prompt-tuning:quantization=nf4").overrides == {"quantization": "nf4"}
    assert parse("qlora:quantization=nf4").overrides == parse("qlora").overrides
    with pytest.raises(ConfigError, match="qlora is lora:quantization=nf4; write lora:quantization=int8 instead"):
        parse("qlora:quantization=int8")
    assert len({parse(m).slug for m in METHODS}) == len(METHODS) == 7


def test_every_method_of_recipes_is_taken():
    for name in method_names():
        assert parse(f"{name}:training.epochs=2").method == name
        assert parse(name.upper().replace("-", "_")).method == name
    for alias, name in ALIASES.items():
        assert parse(alias).method == name
        assert parse(alias).label == alias


def test_groups(monkeypatch):
    assert [s.label for s in parse_all(["all"])] == list(METHODS)
    every = [s.label for s in parse_all(["every"])]
    assert every[: len(METHODS)] == list(METHODS)
    assert {"ia3", "loha"} <= set(every) <= {*METHODS, *method_names()}
    lines = expand("every:training.learning_rate=1e-3|3e-3")
    assert lines[:2] == ["lora:training.learning_rate=1e-3", "lora:training.learning_rate=3e-3"]
    assert len(lines) == 2 * len(every)
    with pytest.raises(ConfigError, match="stand in the list twice: lora"):
        parse_all(["lora", "all"])
    needy = defaults.MethodDefaults(learning_rate=1e-3, power=0.8, needs="targets")
    monkeypatch.setitem(defaults.DEFAULTS, method_names()["ia3"], needy)
    assert "ia3" not in [s.label for s in parse_all(["every"])]


@pytest.mark.parametrize(
    "text", ["", "lroa", "lora:r", "lora:=3", "lora:a.b=1,a.b.c=2", "lora:r=[1", "lora:r=4,r=8", "lora:x={a: 1, a: 2}"]
)
def test_mistakes(text):
    with pytest.raises(ConfigError):
        parse(text)


def test_later_layers_win():
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, None) == {"a": {"b": 3, "c": 2}}
