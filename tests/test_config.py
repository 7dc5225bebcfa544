import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from mmalign import config
from mmalign.config import ConfigError, load_config

MINIMAL = """
policy: {model: some/folder}
prompts: {file: prompts.txt}
rewards: {lab: 1.0}
algorithm: {name: flow_grpo}
"""
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    return str(refused.value)


def test_a_number_in_scientific_notation_is_a_number():
    read = config.parse_yaml(
        "{a: 1e-4, b: 2E5, c: 1.5e+3, d: 3, e: .5, f: 1.0, g: e5, h: 1e, i: '1e-4'}", "x"
    )
    assert read == {
        "a": 1e-4, "b": 2e5, "c": 1.5e3, "d": 3, "e": 0.5, "f": 1.0, "g": "e5", "h": "1e", "i": "1e-4"
    }  # fmt: skip


def test_a_key_that_stands_twice_is_refused(recipe):
    recipe.write_text(MINIMAL + "training: {seed: 1, seed: 2}\n")
    assert "'seed' stands twice" in refusal(recipe)


def test_what_is_no_yaml_is_refused_with_its_line(recipe):
    recipe.write_text("policy:\n  model: [\n")
    assert "mine.yaml, line 3: this is not YAML" in refusal(recipe)


def test_overrides_go_over_the_file_and_are_typed(recipe):
    read = load_config(
        recipe, ["training.iterations=3", "training.learning_rate=2e-5", "policy.lora.targets=[to_q, to_k]"]
    )
    assert read.training.iterations == 3
    assert read.training.learning_rate == 2e-5
    assert read.policy.lora.targets == ("to_q", "to_k")


def test_an_override_reaches_below_a_bare_weight(recipe):
    read = load_config(recipe, ["rewards.lab.measure=strict"])
    assert read.rewards["lab"] == config.RewardSettings(1.0, {"measure": "strict"})


def test_a_reward_of_ones_own_is_overridden_by_its_whole_path(recipe):
    read = load_config(recipe, ["rewards.my_pkg.mine:Mine.weight=0.5", "rewards.my_pkg.mine:Mine.level=3"])
    assert read.rewards["my_pkg.mine:Mine"] == config.RewardSettings(0.5, {"level": 3})
    assert read.weights == {"lab": 1.0, "my_pkg.mine:Mine": 0.5}


def test_null_takes_a_reward_out(recipe):
    assert set(load_config(recipe, ["rewards.lab=null", "rewards.jpeg_compressibility=2"]).rewards) == {
        "jpeg_compressibility"
    }


def test_an_override_without_a_value_is_refused(recipe):
    assert "write section.field=value" in refusal(recipe, "training.iterations")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.iteratons=3", "training (TrainingSettings) has no setting 'iteratons'; did you mean"),
        ("policy.lora.rnk=3", "policy.lora (LoraSettings) has no setting 'rnk'; did you mean 'rank'?"),
        ("algorithm.clpi=3", "algorithm (FlowGRPO) has no setting 'clpi'; did you mean 'clip'?"),
        ("trainings.seed=3", "there is no section 'trainings'; did you mean 'training'?"),
        ("rewards.labb=1", "there is no reward 'labb'; did you mean 'lab'?"),
        ("rewards.lab.mesure=soft", "rewards.lab has no setting 'mesure'; did you mean 'measure'?"),
        ("rewards.lab=much", "rewards.lab: the weight must be a number, got 'much'"),
        ("algorithm.name=flow_gpro", "there is no algorithm 'flow_gpro'; did you mean 'flow_grpo"),
        ("algorithm.name=nowhere.to_be:Found", "cannot import 'nowhere.to_be:Found'"),
        ("algorithm.noise.kind=flo", "algorithm.noise.kind must be 'flow', 'dance', 'linear', 'cps', "),
        ("training.iterations=many", "training.iterations must be a valid integer"),
        ("training.iterations=0", "iterations must be at least 1, got 0"),
        ("prompts.group=1", "prompts.group must be at least 2"),
        ("algorithm.noise.level=0", "noise.level must be above 0"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_with_what_would_be_right(recipe, override, message):
    said = refusal(recipe, override)
    assert message in said
    assert said.startswith("command line: ")


def test_the_file_is_blamed_for_what_the_file_says(recipe):
    recipe.write_text(MINIMAL + "training: {iteratons: 3}\n")
    assert refusal(recipe, "run.dir=x").startswith(f"{recipe}: training (TrainingSettings) has no setting")


def test_a_missing_value_is_named_with_file_section_field_and_meaning(recipe):
    recipe.write_text("prompts: {file: x.txt}\nrewards: {lab: 1}\nalgorithm: {name: flow_grpo}\n")
    said = refusal(recipe)
    assert said.startswith(f"{recipe}: policy.model is missing (PolicySettings.model: ")
    assert "diffusers format" in said


def test_everything_wrong_is_said_at_once(recipe):
    said = refusal(recipe, "training.seeds=1", "policy.modl=x", "rewards.labb=1", "algorithm.klx=0")
    assert len(said.splitlines()) == 4


@pytest.mark.parametrize("text", ["rewards: {}", "rewards:", "rewards: lab"])
def test_a_run_without_rewards_is_refused(recipe, text):
    recipe.write_text(MINIMAL.replace("rewards: {lab: 1.0}", text))
    assert "rewards must name at least one reward and its weight" in refusal(recipe)


def test_a_missing_file_is_refused_with_the_nearest_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "did you mean assets/recipes/quickstart.yaml?" in refusal("assets/recipes/quickstar.yaml")


def test_a_run_without_a_folder_is_named_after_its_file(recipe):
    assert load_config(recipe).run.dir == "runs/mine"
    assert load_config(recipe, ["run.dir=elsewhere"]).run.dir == "elsewhere"


def test_resolved_settings_read_back_as_themselves(recipe, tmp_path):
    settings = load_config(
        recipe, ["rewards.lab.measure=strict", "algorithm.clip=1e-5", "training.betas=[0.8, 0.9]"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(settings.to_yaml())
    assert load_config(again) == settings


def every_settings_class():
    kinds = [*config.SECTIONS.values(), *(config.algorithm_class(name) for name in config.ALGORITHMS)]
    from mmalign.rewardmodels import REWARDS

    return [*kinds, *(config.named_class(path) for path in REWARDS.values())]


@pytest.mark.parametrize("kind", every_settings_class(), ids=lambda kind: kind.__name__)
def test_every_setting_says_what_it_means(kind):
    silent = [f.path for f in config.fields(kind, kind.__name__) if not f.meaning]
    assert silent == []


def test_a_comment_may_stand_behind_a_setting_or_above_it():
    @dataclasses.dataclass
    class Settings:
        # above, in
        # two lines
        first: int = 1  # and behind
        second: tuple[int, ...] = (
            1,
            2,
        )  # behind a long one
        third: int = 3

    said = config.comments(Settings)
    assert said == {"first": "above, in two lines and behind", "second": "behind a long one"}


def test_the_help_explains_every_setting():
    text = config.explain()
    for kind, path in ((kind, path) for path, kind in config.SECTIONS.items()):
        for field in config.fields(kind, path):
            assert f"  {field.path}  (" in text
    assert "policy.lora.rank  (int, default 32)" in text
    assert "policy.model  (str, required)" in text


def test_saying_one_nested_setting_keeps_the_others_as_the_method_has_them(recipe):
    default = load_config(recipe, ["algorithm.name=flow_grpo_fast"]).algorithm.noise
    assert default.kind == "cps"
    said = load_config(recipe, ["algorithm.name=flow_grpo_fast", "algorithm.noise.level=0.5"]).algorithm.noise
    assert said == dataclasses.replace(default, level=0.5)
    assert 'ddim, default "cps")' in config.explain()


def test_the_schema_forbids_unknown_keys_at_every_depth():
    def objects(node):
        if isinstance(node, dict):
            if "properties" in node and node.get("type") == "object":
                yield node
            for below in node.values():
                yield from objects(below)
        if isinstance(node, list):
            for below in node:
                yield from objects(below)

    found = list(objects(config.json_schema()))
    assert len(found) > 8
    assert [node for node in found if "additionalProperties" not in node] == []


def test_the_schema_and_the_page_of_settings_are_current():
    """If not: mmalign schema --out assets/recipes/schema.json, mmalign schema --markdown --out docs/..."""
    assert json.loads((ROOT / "assets/recipes/schema.json").read_text()) == config.json_schema()
    assert (ROOT / "docs/configuration.md").read_text() == config.markdown()


def test_plain_settings_hold_nothing_that_yaml_cannot(recipe):
    settings = load_config(recipe).to_dict()
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings
