import dataclasses
import random

import pytest

from segnet_scratch.config import Config, check_resume, describe, difference, load_config
from segnet_scratch.errors import ConfigError

# For each key one legal value that is not the default, as TOML and as it lies in Config.
LEGAL = {
    "model": ('"segnet-basic"', "segnet-basic"),
    "decoder": ('"deconv"', "deconv"),
    "pooling": ('"floor"', "floor"),
    "width": ("0.25", 0.25),
    "dropout": ("true", True),
    "dtype": ('"float64"', "float64"),
    "engine": ('"fused"', "fused"),
    "precision": ('"tf32"', "tf32"),
    "size": ("[96, 128]", (96, 128)),
    "batch": ("12", 12),
    "accumulate": ("2", 2),
    "sync_bn": ("true", True),
    "gradient_sum": ('"bf16"', "bf16"),
    "epochs": ("7", 7),
    "steps": ("40000", 40000),
    "lr": ("1e-1", 0.1),
    "momentum": ("0.0", 0.0),
    "decay": ("0.0", 0.0),
    "bias_lr": ("2", 2.0),
    "encoder_lr": ("0.1", 0.1),
    "schedule": ('"poly"', "poly"),
    "lr_steps": ("[0.6, 0.9]", (0.6, 0.9)),
    "lr_gamma": ("0.5", 0.5),
    "poly_power": ("1", 1.0),
    "warmup": ("100", 100),
    "clip_norm": ("1", 1.0),
    "loss_normalisation": ('"valid"', "valid"),
    "class_weights": ("[0.5, 1, 2.25]", (0.5, 1.0, 2.25)),
    "label_smoothing": ("0.1", 0.1),
    "scale": ("[0.5, 2]", (0.5, 2.0)),
    "short_side": ("[48, 64]", (48, 64)),
    "flip": ("false", False),
    "brightness": ("0.25", 0.25),
    "contrast": ("0.25", 0.25),
    "saturation": ("0.25", 0.25),
    "hue": ("0.25", 0.25),
    "init": ('"vgg16.safetensors"', "vgg16.safetensors"),
    "train_split": ('"train_aug"', "train_aug"),
    "val_split": ('"none"', "none"),
    "bad_samples": ('"skip"', "skip"),
    "seed": ("9223372036854775807", 2**63 - 1),
    "workers": ("0", 0),
    "cache": ('"memory"', "memory"),
    "checkpoint_every": ("0", 0),
    "validate_every": ("250", 250),
    "validate_epochs": ("5", 5),
    "patience": ("3", 3),
}

# Values of the wrong type, out of range, or not finite.
REFUSED = {
    "model": ["vgg", 1, ""],
    "decoder": ["unpool", True, 2],
    "pooling": ["round", True, 2],
    "width": [0, -1.0, "1", True, float("nan"), float("inf"), 10**400],
    "dropout": [0.5, 1, "yes"],
    "dtype": ["float16", 64, "double"],
    "engine": ["fast", True],
    "precision": ["fp8", 32],
    "size": [31, 0, -224, 224.0, True, [64], [64, 64, 3], [64, 31], [64, True], "64x64", []],
    "batch": [0, 1.0, True, "4", 2**63],
    "accumulate": [0, 5, 1.0, True],
    "sync_bn": [1, "yes"],
    "gradient_sum": ["float16", 1],
    "epochs": [0, -1, 1.5, False],
    "steps": [0, 1e3, "1000"],
    "lr": [0, -1e-3, "fast", float("nan"), float("-inf"), True, [0.1]],
    "momentum": [1, -0.1, float("nan")],
    "decay": [-5e-4, float("inf"), None],
    "bias_lr": [-1, "2"],
    "encoder_lr": [-1, "2"],
    "schedule": ["cosine", 0],
    "lr_steps": [0.5, [0], [0.9, 0.6], [0.5, 0.5], [0.5, 2], [1.5], [float("nan")], [True], "half"],
    "lr_gamma": [0, 1, -0.1],
    "poly_power": [0, -0.9],
    "warmup": [-1, 0.5],
    "clip_norm": [-1, float("inf"), True],
    "loss_normalisation": ["pixels", True],
    "class_weights": [1.0, [-1.0], ["a"], [float("nan")], [True], [0, 0], "balanced"],
    "label_smoothing": [1, -0.1, "some"],
    "scale": [1.0, [1.0], [0, 1], [1.25, 1.0], [1, float("inf")], [1, 1, 1], [True, True]],
    "short_side": [48, [48], [64, 48], [31, 64], [48, 64.0], [48, 64, 80]],
    "flip": [1, 0, "true"],
    "brightness": [-0.1, 1.1, True],
    "contrast": [-0.1, 1.1, True],
    "saturation": [-0.1, 1.1, True],
    "hue": [-0.1, 0.6, True],
    "init": [1, True, "a\x1b", "a\udcdf"],
    "train_split": ["", "../train", "a b", 1],
    "val_split": ["", "a/b", False],
    "bad_samples": ["ignore", True],
    "seed": [-1, 1.0, 2**63],
    "workers": [-1, "all"],
    "cache": ["ram", True],
    "checkpoint_every": [-1, 0.5],
    "validate_every": [-1, True],
    "validate_epochs": [0, 1.5],
    "patience": [-1, 0.5],
}

KEYS = [setting.name for setting in dataclasses.fields(Config)]


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_tables_of_this_file_cover_every_key():
    assert list(LEGAL) == list(REFUSED) == KEYS


class TestValues:
    def test_defaults(self):
        config = Config()
        assert (config.model, config.width, config.dropout, config.size, config.batch) == ("segnet", 1.0, False, 224, 4)
        assert (config.epochs, config.steps) == (100, None)
        assert (config.lr, config.momentum, config.decay, config.bias_lr) == (1e-3, 0.9, 5e-4, 1.0)
        assert (config.schedule, config.poly_power, config.warmup) == ("constant", 0.9, 0)
        assert (config.loss_normalisation, config.class_weights) == ("weights", ())
        assert (config.scale, config.flip, config.seed, config.workers) == ((1.0, 1.25), True, 0, 8)
        assert (config.checkpoint_every, config.validate_every) == (500, 0)

    @pytest.mark.parametrize("key", KEYS)
    def test_legal_values_from_a_file_and_from_an_override(self, tmp_path, key):
        text, expected = LEGAL[key]
        assert expected != getattr(Config(), key)
        for config in (load_config(write(tmp_path, f"{key} = {text}"), []), load_config(None, [f"{key}={text}"])):
            assert getattr(config, key) == expected
            assert type(getattr(config, key)) is type(expected)
            changed = {key} | ({"epochs"} if key == "steps" else set())
            assert set(difference(Config(), config)) == changed

    @pytest.mark.parametrize("key", KEYS)
    def test_refused_values_are_named(self, key):
        for value in REFUSED[key]:
            with pytest.raises(ConfigError) as raised:
                Config(**{key: value})
            assert str(raised.value).startswith(f"{key}: expected ")
            assert f"got {value!r}" in str(raised.value)

    def test_the_step_schedule_needs_its_steps(self):
        with pytest.raises(ConfigError, match=r"lr_steps = \[0\.6, 0\.9\]"):
            Config(schedule="step")
        assert Config(schedule="step", lr_steps=[10, 20]).lr_steps == (10.0, 20.0)

    def test_class_weights_by_name(self):
        config = load_config(None, ["class_weights=median-frequency"])
        assert config.class_weights == "median-frequency"
        assert 'class_weights = "median-frequency"' in config.to_toml()

    def test_the_example_of_an_error_is_legal(self):
        for key in KEYS:
            with pytest.raises(ConfigError) as raised:
                Config(**{key: object()})
            example = str(raised.value).partition("for example ")[2].removesuffix(".")
            assert load_config(None, [example])

    def test_image_size(self):
        assert Config().image_size == (224, 224)
        assert Config(size=(96, 128)).image_size == (96, 128)
        assert Config(size=[64, 64]) == Config(size=64)

    def test_a_config_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().lr = 1.0


class TestLoad:
    def test_overrides_are_toml_and_bare_words(self):
        config = load_config(None, ["size=64", "lr=1e-2", "model=segnet-basic", "schedule = poly", "flip=false"])
        assert config == Config(size=64, lr=0.01, model="segnet-basic", schedule="poly", flip=False)
        assert load_config(None, ["size=[96,128]", 'model="segnet"']) == Config(size=(96, 128))

    def test_the_later_source_wins(self, tmp_path):
        path = write(tmp_path, "lr = 0.1\nbatch = 8\n")
        config = load_config(path, ["lr=0.2", "lr=0.3"])
        assert (config.lr, config.batch) == (0.3, 8)

    def test_steps_and_epochs_clear_each_other(self, tmp_path):
        steps, epochs = write(tmp_path, "steps = 10"), "epochs=3"
        assert load_config(steps, []) == Config(steps=10)
        assert load_config(steps, [epochs]) == Config(epochs=3)
        assert load_config(steps, [epochs, "steps=20"]) == Config(steps=20)
        assert load_config(None, ["steps=20", epochs]) == Config(epochs=3)

    def test_steps_and_epochs_in_one_file(self, tmp_path):
        path = write(tmp_path, "steps = 10\nepochs = 2\n")
        with pytest.raises(ConfigError, match=r"config\.toml: epochs and steps: .*remove one"):
            load_config(path, ["steps=5"])

    @pytest.mark.parametrize(
        ("key", "near"), [("learnrate", ""), ("momentun", "momentum"), ("LR", "lr"), ("bias-lr", "bias_lr")]
    )
    def test_unknown_keys(self, tmp_path, key, near):
        path = write(tmp_path, f"{key} = 1\n")
        expected = f"unknown setting '{key}'; " + (f"did you mean {near}\\?" if near else "the keys are model,")
        with pytest.raises(ConfigError, match=rf"config\.toml: {expected}"):
            load_config(path, [])
        with pytest.raises(ConfigError, match=expected):
            load_config(None, [f"{key}=1"])

    def test_tables_are_unknown_keys(self, tmp_path):
        with pytest.raises(ConfigError, match="unknown setting 'train'"):
            load_config(write(tmp_path, "[train]\nlr = 0.1\n"), [])

    def test_a_wrong_value_in_a_file_names_the_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"config\.toml: lr: expected a finite number above 0, got 'fast'"):
            load_config(write(tmp_path, 'lr = "fast"'), [])

    def test_files_that_cannot_be_read(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nothing\.toml: .*No such file"):
            load_config(tmp_path / "nothing.toml", [])
        with pytest.raises(ConfigError, match="directory"):
            load_config(tmp_path, [])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"lr = 0.1\nbatch = = 4\n", "line 2"),
            (b"lr = 0.1\nlr = 0.2\n", "line 2"),
            (b"model = segnet\n", "line 1"),
            (b"model = '\xff'\n", "utf-8"),
            (b"size = " + b"[" * 100_000, ""),
        ],
    )
    def test_invalid_toml_names_file_and_line(self, tmp_path, content, message):
        path = tmp_path / "config.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"config\.toml: expected valid TOML.*{message}"):
            load_config(path, [])

    def test_a_byte_order_mark_is_skipped(self, tmp_path):
        path = tmp_path / "config.toml"
        path.write_bytes(b"\xef\xbb\xbflr = 0.5\r\n")
        assert load_config(path, []).lr == 0.5

    @pytest.mark.parametrize(
        "override", ["lr", "=1", "lr=", "lr=.5", "size=[64", "size=64 64", "lr=1\nbatch=2", "lr=1e-2e", "model=a b", ""]
    )
    def test_overrides_that_are_no_key_and_value(self, override):
        with pytest.raises(ConfigError, match="--set"):
            load_config(None, [override])

    @pytest.mark.parametrize("override", ["lr=nan", "lr=inf", "lr=-inf", "lr=fast", "flip=False", "flip=1"])
    def test_overrides_of_the_wrong_type_or_not_finite(self, override):
        with pytest.raises(ConfigError, match=f"{override.partition('=')[0]}: expected"):
            load_config(None, [override])


class TestToml:
    def test_every_value_comes_back_equal(self, tmp_path):
        generator = random.Random(5)
        for _ in range(200):
            chosen = [key for key in KEYS if key != "epochs" and generator.random() < 0.5]
            if {"engine", "accumulate"} <= set(chosen):  # which do not go together
                chosen.remove("accumulate")
            if {"dtype", "gradient_sum"} <= set(chosen):
                chosen.remove("gradient_sum")
            if {"val_split", "patience"} <= set(chosen):
                chosen.remove("patience")
            config = Config(**{key: LEGAL[key][1] for key in chosen})
            config = dataclasses.replace(config, lr=generator.random() ** 9 + 1e-300, seed=generator.getrandbits(63))
            assert load_config(write(tmp_path, config.to_toml()), []) == config

    def test_each_key_stands_under_its_meaning(self):
        lines = Config(steps=5).to_toml().splitlines()
        for key, _, meaning in describe():
            if key != "epochs":
                place = next(i for i, line in enumerate(lines) if line.startswith(f"{key} = "))
                assert lines[place - 1] == f"# {meaning}"
        assert not any(line.startswith("epochs") for line in lines)

    def test_the_description_has_every_key_with_its_default(self):
        rows = describe()
        assert [key for key, _, _ in rows] == KEYS
        for key, default, meaning in rows:
            assert meaning
            assert "\n" not in meaning
            if default == "-":
                assert getattr(Config(), key) is None
            else:
                assert load_config(None, [f"{key}={default}"]) == Config()


class TestResume:
    SAFE = ("epochs", "steps", "workers", "cache", "checkpoint_every", "validate_every", "validate_epochs", "patience")
    SAFE += ("bad_samples",)

    def test_the_same_settings(self):
        check_resume(Config(size=64), Config(size=(64, 64)))
        assert difference(Config(size=64), Config(size=(64, 64))) == {}

    @pytest.mark.parametrize("key", KEYS)
    def test_each_key(self, key):
        old, new = Config(), Config(**{key: LEGAL[key][1]})
        if key in self.SAFE:
            check_resume(old, new)
            return
        with pytest.raises(ConfigError) as raised:
            check_resume(old, new)
        before, after = difference(old, new)[key]
        assert (before, after) == (getattr(Config(), key), LEGAL[key][1])
        assert f"{key} (was {before!r}, now {after!r})" in str(raised.value)

    @pytest.mark.parametrize("key", SAFE)
    def test_the_length_sets_the_rates_of_the_poly_schedule(self, key):
        old = Config(schedule="poly")
        new = Config(schedule="poly", **{key: LEGAL[key][1]})
        if key in ("epochs", "steps"):
            with pytest.raises(ConfigError, match="epochs \\(was 100, now"):
                check_resume(old, new)
        else:
            check_resume(old, new)

    def test_steps_at_shares_bind_the_length_and_steps_that_are_counted_do_not(self):
        for lr_steps, bound in (([0.5], True), ([20], False)):
            old, new = (Config(schedule="step", lr_steps=lr_steps, epochs=epochs) for epochs in (10, 20))
            if bound:
                with pytest.raises(ConfigError, match="epochs \\(was 10, now 20\\)"):
                    check_resume(old, new)
            else:
                check_resume(old, new)

    def test_every_changed_key_is_named(self):
        with pytest.raises(ConfigError, match=r"batch \(was 4, now 2\), lr \(was 0\.001, now 0\.1\)"):
            check_resume(Config(workers=1), Config(batch=2, lr=0.1))
