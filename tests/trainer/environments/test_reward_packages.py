"""The rewards of math-verify and reasoning-gym, where these are installed, and what is said where they are not."""

import importlib.util
import sys

import pytest

from configs.errors import BadInput
from trainer.environments.rewards.registry import load_reward
from trainer.environments.rewards.reply import Reply


def score(name, text, options=None, **row):
    loaded = load_reward(name, options or {}, "r")
    return loaded.function(Reply(text, row, [], 1, 10, False), **loaded.options)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"So $\boxed{\frac{1}{2}}$.", "0.5", 1.0),
        (r"The answer is $\frac{\sqrt{3}}{3}$", r"\frac{1}{\sqrt{3}}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+1", 0.0),
        (r"\boxed{x=3}", "3", 1.0),
        (r"\boxed{\{1,2\}}", r"$\{2,1\}$", 1.0),
        (r"\boxed{[0,1)}", "[0,1)", 1.0),
        (r"\boxed{[0,1)}", "[0,1]", 0.0),
        ("It makes 72", "48+24 = <<48+24=72>>72\n#### 72", 1.0),
        ("It makes 73", "48+24 = <<48+24=72>>72\n#### 72", 0.0),
        (r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1.0),
        ("", "1", 0.0),
        ("I do not know", "1", 0.0),
        ("1", None, None),
    ],
)
def test_math(text, answer, value):
    assert score("math", text, answer=answer) == value


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
@pytest.mark.parametrize("task", ["leg_counting", "chain_sum", "countdown"])
def test_reasoning_gym(task):
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(task, size=3, seed=1):
        assert score("reasoning_gym", entry["answer"], **entry) == 1.0
        assert score("reasoning_gym", f"<answer>{entry['answer']}</answer>", {"after": "<answer>"}, **entry) == 1.0
        assert score("reasoning_gym", "nonsense", **entry) < 0.1
    with pytest.raises(ValueError, match="reasoning-gym did not make it"):
        score("reasoning_gym", "1", metadata={})


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("math", "math_verify", "math-verify"), ("reasoning_gym", "reasoning_gym", "reasoning-gym")],
)
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    class Refuse:
        def find_spec(self, full_name, path=None, target=None):
            if full_name == module:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    for loaded in [one for one in sys.modules if one.split(".")[0] == module or one.endswith((".mathematics", ".gym"))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
    with pytest.raises(BadInput, match=f"r.function={name}: needs a package that is not installed; .*{package}"):
        load_reward(name, {}, "r")
