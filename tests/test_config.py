"""Config: what is accepted, what is refused and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trajdist.config import Config
from trajdist.config_files import dump_yaml, find_config, load_config
from trajdist.config_parsing import parse_config
from trajdist.config_schema import fields, flatten, json_schema
from trajdist.errors import ConfigError, DataError
from trajdist.sharding import Selection

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_by_path_and_by_name(path):
    assert load_config(path) == load_config(path.stem)
    assert find_config(f"{path.stem}.yaml").samefile(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_hold_out_enough_of_a_small_domain(path):
    """The same fraction is held out of both sets: what is plenty of ImageNet may be two images of a domain."""
    held_out = Selection.draw(300, -1, load_config(path).calibration.holdout_fraction, seed=0, phase=2).num_holdout
    assert 1 / (held_out + 1) < 0.05, "the rate of false alarms that they support"


def test_default_yaml_shows_the_defaults():
    shown = flatten(yaml.safe_load(find_config("default").read_text()))
    defaults = {key: default for key, default, *_ in fields()}
    # Its Phase 2 walks more often through the domain set.
    assert {key for key, value in shown.items() if defaults[key] != value} == {"data.domain.num_epochs"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("train.learning_rate=1e-05", "train.learning_rate", 1e-5),
        ("runtime.mixed_precision=no", "runtime.mixed_precision", "no"),
        ("backbone.weights=none", "backbone.weights", "none"),
        ("data.imagenet.path=", "data.imagenet.path", None),
        ("data.imagenet.path=null", "data.imagenet.path", None),
        ("data.imagenet.path=/a=b", "data.imagenet.path", "/a=b"),
        ("data.imagenet.path=/data/set #1", "data.imagenet.path", "/data/set #1"),
        ("data.imagenet.path=007", "data.imagenet.path", "007"),
        ("data.imagenet.path=/d/a: b", "data.imagenet.path", "/d/a: b"),
        ("data.imagenet.path=[set]", "data.imagenet.path", "[set]"),
        ("data.imagenet.path='007'", "data.imagenet.path", "007"),
        ("run_dir=runs/x #2", "run_dir", "runs/x #2"),
        ("backbone.blocks=[layer1.*, layer2.0]", "backbone.blocks", ["layer1.*", "layer2.0"]),
        ("domain_adaptation.lora.target_modules=[q, v]", "domain_adaptation.lora.target_modules", ["q", "v"]),
        ("domain_adaptation.lora.rank=3", "domain_adaptation.lora.rank", 3),
        ("domain_adaptation.enabled=false", "domain_adaptation.enabled", False),
        ("data.num_workers=0", "data.num_workers", 0),
        ("data.num_workers=auto", "data.num_workers", "auto"),
        ("seed=010", "seed", 10),
        ("train.max_grad_norm=.inf", "train.max_grad_norm", float("inf")),
    ],
)
def test_overrides_are_typed(override, key, value):
    assert flatten(load_config("debug", [override]).model_dump())[key] == value


def test_the_path_of_a_domain_is_text_too():
    config = load_config("debug", ["data.domain.path=null", "data.domains.wood.path=2024 #2"])
    assert config.data.domains["wood"].path == "2024 #2"


def test_the_last_override_wins_and_a_section_can_be_given_whole():
    config = load_config(None, ["model={type: vae, hidden_dim: 8}", "model.hidden_dim=16", "model.hidden_dim=32"])
    assert (config.model.type, config.model.hidden_dim) == ("vae", 32)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.imagenet.batchsize=3", ["data.imagenet.batchsize", "did you mean data.imagenet.batch_size?"]),
        ("modle.type=vae", ["modle", "did you mean model.type?"]),
        ("Data.image_size=3", ["Data.image_size (= 3)", "did you mean data.image_size?"]),
        ("data.domains.Road.Path=x", ["did you mean data.domains.Road.path?"]),
        ("lora.rank=3", ["lora.rank (= 3)", "did you mean domain_adaptation.lora.rank?"]),
        (
            "data.domains.größe.path=x",
            ["data.domains has a domain 'größe': write its name with only letters A-Z and a-z"],
        ),
        ("data.domains={a.b: {path: x}}", ["data.domains has a domain 'a.b': write its name with only letters"]),
        ("data.domains={3: {path: x}}", ["data.domains has a domain 3: write its name in quotes, with only letters"]),
        ("nokey=1", ["unknown config key nokey (= 1): trajdist config lists all keys."]),
        ("data.imagenet.lr=1", ["unknown config key data.imagenet.lr (= 1): trajdist config lists"]),
        ("logging.trackers=tensorboard", ["valid list, as in logging.trackers=[tensorboard] (see"]),
        ("backbone.blocks=[layer?.*, stem]", ["valid list, as in \"backbone.blocks=['layer?.*','stem']\" (see"]),
        ("model.hidden_dim=-1", ["model.hidden_dim = -1", "greater than 0"]),
        ("model.hidden_dim=many", ["model.hidden_dim = 'many'", "integer"]),
        ("model.hidden_dim=1.5", ["model.hidden_dim = 1.5"]),
        ("model.type=lstm", ["model.type = 'lstm'", "'autoencoder', 'vae' or 'transformer'"]),
        ("data.imagenet.num_samples=-2", ["data.imagenet.num_samples = -2", "-1"]),
        ("data.num_workers=-1", ["data.num_workers = -1", "should be 'auto' or input should be greater than or equal"]),
        ("data.num_workers=5000", ["data.num_workers = 5000", "less than or equal to 1024"]),
        ("data.imagenet.batch_size=99999999999", ["data.imagenet.batch_size = 99999999999", "equal to 65536"]),
        ("data.domain.gradient_accumulation_steps=99999999999", ["less than or equal to 65536"]),
        ("domain_adaptation.lora.rank=99999999999", ["less than or equal to 65536"]),
        ("train.learning_rate=.inf", ["train.learning_rate = inf", "finite number"]),
        ("domain_adaptation.lora.alpha=inf", ["domain_adaptation.lora.alpha = 'inf'", "finite number"]),
        ("train.kl_weight=.inf", ["train.kl_weight = inf", "finite number"]),
        ("data.domain.batch_size=yes", ["data.domain.batch_size = True", "a number, not a yes or no"]),
        ("ema.decay=off", ["ema.decay = False", "a number, not a yes or no"]),
        (
            "backbone.blocks=[1, 2]",
            ["backbone.blocks = 1 is not possible: input should be a valid string, so write it in"],
        ),
        ("seed=" + "1" * 5000, ["seed = '111", "..."]),
        ("data.domains={a: {path: p}, a: {path: q}}", ["data.domains='{a", "a is set twice, set it once."]),
        ("calibration.holdout_fraction=1", ["calibration.holdout_fraction = 1", "less than 1"]),
        ("train.learning_rate=0", ["train.learning_rate = 0"]),
        ("train.learning_rate=.nan", ["train.learning_rate"]),
        ("seed=4294967296", ["seed = 4294967296"]),
        ("model=3", ["model = 3 is not a group of keys"]),
        ("model.hidden_dim", ["'model.hidden_dim' is not of the form key=value"]),
        ("=3", ["'=3' is not of the form key=value"]),
        ("model.type={a: 1}", ["model.type"]),
        (
            "domain_adaptation.lora.target_modules=[a,b",
            ["='[a,b' is not a valid regular expression", "[encoder.0"],
        ),
        ("domain_adaptation.lora.target_modules=q{99999999999}", ["not a valid regular expression"]),
    ],
)
def test_mistakes_are_named(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config("debug", [override])
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(word in sentence for word in words), sentence


def test_one_domain_and_several_say_how_to_leave_the_one_out():
    both = ["data.domain.path=a", "data.domains={road: {path: b}}"]
    with pytest.raises(ConfigError, match=r"both set: leave one out, as data\.domain\.path=null does\.$"):
        load_config(None, both)
    assert list(load_config(None, [*both, "data.domain.path=null"]).data.domains) == ["road"]


def test_heads_must_divide_the_width_where_they_matter():
    with pytest.raises(ConfigError, match=r"model\.num_heads=3 does not divide model\.hidden_dim=64"):
        load_config(None, ["model.type=transformer", "model.hidden_dim=64", "model.num_heads=3"])
    with pytest.raises(ConfigError, match="does not divide"):
        load_config(None, ["model.type=transformer", "model.hidden_dim=66"])
    with pytest.raises(ConfigError, match="does not divide"):
        load_config(None, ["model.num_heads=3", "model.hidden_dim=64"])
    assert load_config(None, ["model.type=autoencoder", "model.hidden_dim=66"]).model.hidden_dim == 66


@pytest.mark.parametrize("text", ["just words", "- a\n- b\n", "a: b: c\n", "\t- {", "3", b"\xff\xfe\x00\x01"])
def test_a_file_that_is_no_config(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run_dir: 2026-13-01", "'2026-13-01' cannot be read as timestamp"),
        ("run_dir: 2026-01-01", "run_dir = '2026-01-01' is not possible: .* write it in quotes"),
        ("backbone: {weights: }", "backbone.weights = None is not possible: .* the word none for random weights"),
        ("backbone: {name: 18}", "backbone.name = 18 is not possible: .* write it in quotes"),
        ("seed: !!int x", "'x' cannot be read as int"),
        ("seed: !!bool x", "'x' cannot be read as bool"),
        ("seed: !!timestamp x", "'x' cannot be read as timestamp"),
        (f"seed: {'1' * 5000}", "cannot be read as int"),
        (f"seed: 0x{'f' * 5000}", "cannot be read as int"),
        ("seed: !!int [1]", "expected a scalar node"),
        ('run_dir: "a\\0b"', r"'a\\x00b' cannot be read as text"),
        ('run_dir: "\\ud800"', r"'\\ud800' cannot be read as text"),
        ("data: &a {domain: *a}", "recursive"),
        (f"seed: {'[' * 1000}", "nested too deeply"),
        ("data: {1: 2}", "the config has a key 1, which is not text: "),
        (f"seed: [{'1, ' * 3000}]", r"seed = \[1, 1, 1, 1, 1, 1, \.\.\.\] is not possible"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "override", ['run_dir="a\\0b"', "backbone={name: 2026-13-01}", "data.domains={a: {path: !!int x}}"]
)
def test_an_override_that_cannot_be_meant(override):
    with pytest.raises(
        ConfigError, match=r"is not possible: .* cannot be read as (text|timestamp|int), write another value\."
    ):
        load_config(None, [override])


@pytest.mark.parametrize("key", ["seed", "surplus"])
def test_aliases_cannot_make_a_message_of_gigabytes(tmp_path, key):
    """Ten lines stand for a thousand million words."""
    levels = [f"a{n}: &a{n} {{{', '.join(f'b{i}: *a{n - 1}' for i in range(9))}}}" for n in range(1, 10)]
    path = tmp_path / "many.yaml"
    path.write_text(f"{key}: {{a0: &a0 word, {', '.join(levels)}}}")
    with pytest.raises(ConfigError, match=key) as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000


def test_yaml_tags_run_no_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError):
        load_config(path)
    assert not (tmp_path / "made").exists()


def test_a_missing_config_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"debug.*default.*low_memory"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@given(
    st.integers(1, 4096),
    st.floats(1e-12, 1e3),
    st.sampled_from(["no", "bf16", "auto"]),
    st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")))),
)
def test_dump_and_parse_are_inverse(width, rate, precision, path):
    tree = {
        "model": {"hidden_dim": width},
        "train": {"learning_rate": rate},
        "runtime": {"mixed_precision": precision},
        "data": {"domain": {"path": path}},
    }
    config = parse_config(tree)
    assert parse_config(yaml.safe_load(dump_yaml(config))) == config


def test_every_field_is_described_and_in_the_dump():
    described = {key: text for key, _, text, _ in fields()}
    assert all(described.values())
    dumped = flatten(yaml.safe_load(dump_yaml(Config())))
    assert {key for key in described if key not in dumped} == set()


def test_schema_follows_the_config():
    schema = json.loads(json_schema())

    def leaf(key: str) -> dict:
        node = schema
        for part in key.split("."):
            assert node["additionalProperties"] is False
            node = node["properties"][part]
            # Before pydantic 2.9 a reference beside a description is wrapped.
            node = node.get("allOf", [node])[0]
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        return node

    for key, default, text, _ in fields():
        assert leaf(key)["default"] == default, key
        assert leaf(key)["description"] == text, key
    assert leaf("model.hidden_dim")["exclusiveMinimum"] == 0
    assert leaf("model.type")["enum"] == ["autoencoder", "vae", "transformer"]


def test_readme_lists_every_key():
    rows = [line.split("|") for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("| `")]
    table = {cells[1].strip(" `·"): cells for cells in rows if len(cells) == 5 and "." in cells[1]}
    if not table:
        pytest.skip("README.md has no table of keys")
    for key, default, text, may_change in fields():
        row = next((cells for cells in rows if cells[1].strip(" `·") == key), None)
        assert row is not None, f"README.md lacks {key}"
        assert json.loads(row[2].strip(" `")) == default, f"README.md has another default for {key}"
        assert ("·" in row[1]) == may_change, f"README.md marks {key} wrongly"
        assert row[3].strip() == text, f"README.md describes {key} otherwise"


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    """PyYAML would keep the last ``data`` and drop what the first one says."""
    path = tmp_path / "twice.yaml"
    path.write_text("data: {image_size: 64}\nseed: 1\ndata: {num_workers: 2}\n")
    with pytest.raises(ConfigError, match=r"data is set twice .*line 3"):
        load_config(path)


@pytest.mark.parametrize("pattern", ["x-{0..99999999999}.tar", "{0..99999}/{0..99999}.tar"])
def test_braces_of_billions_are_refused_at_once(pattern):
    from trajdist.data.sources import open_source

    with pytest.raises(DataError, match="more than 1,000,000 shards"):
        open_source(f"/data/{pattern}", "IMAGES")


def test_a_pattern_that_the_shell_has_expanded_is_refused():
    shards = [f"data.imagenet.path=/data/{number:03}.tar" for number in range(3)]
    with pytest.raises(ConfigError, match=r"000\.tar' and .*001\.tar' both set data\.imagenet\.path.*quote"):
        load_config("debug", shards)
    domains = ["data.domain.path=null", *(f"data.domains.pcb{n}.path=/visa/pcb{n}/train/good" for n in (1, 2))]
    assert list(load_config("debug", domains).data.domains) == ["pcb1", "pcb2"], "other keys"
    # Scripts put their own overrides last.
    assert load_config("debug", ["data.domain.path=null", "data.domain.path=here"]).data.domain.path == "here"
    assert load_config("debug", ["data.domain.path=there", "data.domain.path=here"]).data.domain.path == "here"


def test_merged_keys_may_be_overridden(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(
        "data:\n  domains:\n    a: &b {<<: {batch_size: 4, path: q}, path: p}\n  imagenet: {<<: *b, num_epochs: 2}\n"
    )
    data = load_config(path).data
    assert (data.imagenet.path, data.imagenet.batch_size, data.domains["a"].path) == ("p", 4, "p")
