"""The pool of reward workers: order, weights, every fault a reward can have, and ends that leave nothing behind."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from configs.errors import BadInput
from configs.sections.reward import RewardConfig
from trainer.environments.rewards.reply import Reply
from trainer.environments.scoring import RewardPool, Score, part_names

ODD = "tests.trainer.environments.odd_rewards"
ROW = {"answer": "4"}


def reply(text, row=ROW):
    return Reply(text, row, [{"role": "user", "content": "2 + 2?"}], len(text), 100, False)


@pytest.fixture
def make_pool():
    pools = []

    def make(*rewards, num_workers=2):
        configs = [one if isinstance(one, RewardConfig) else RewardConfig(**one) for one in rewards]
        pools.append(RewardPool(configs, num_workers))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    assert not [one for one in psutil.Process().children() if "trainer.environments.worker" in " ".join(one.cmdline())]


def test_totals_are_weighted_sums_of_what_applies(make_pool):
    pool = make_pool(
        {"function": "exact_match", "weight": 2.0},
        {"function": f"{ODD}:half", "weight": -1.0},
        {"function": "numeric", "options": {"column": "number"}, "weight": 10.0},
    )
    pool.check([ROW, {"number": 4}], 100)
    done = []
    scores = pool.score([reply("4"), reply("5"), reply("4", {"number": 4})], lambda *one: done.append(one))
    assert scores == [
        Score(1.5, {"exact_match": 1.0, "half": 0.5, "numeric": None}),
        Score(-0.5, {"exact_match": 0.0, "half": 0.5, "numeric": None}),
        Score(9.5, {"exact_match": None, "half": 0.5, "numeric": 1.0}),
    ]
    assert sorted(done, key=lambda one: one[0]) == list(enumerate(scores))
    assert pool.score([]) == []


def test_where_nothing_applies_there_is_no_total(make_pool):
    assert make_pool({"function": "exact_match"}).score([reply("x", {})]) == [Score(None, {"exact_match": None})]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_scores_depend_on_neither_order_nor_number_of_workers(make_pool, num_workers):
    pool = make_pool({"function": f"{ODD}:odd", "options": {"scale": "2"}}, num_workers=num_workers)
    replies = [reply("x" * size) for size in range(300)]
    random.Random(0).shuffle(replies)
    assert [score.total for score in pool.score(replies)] == [2.0 * len(one.text) for one in replies]


FAULTS = {
    "raise": "KeyError: 'answer'",
    "hang": "took longer than 1 s",
    "hang in C": "took longer than 1 s",
    "ignore signals": "took longer than 1 s",
    "exit": "its process ended with code 3",
    "leave": "SystemExit: done",
    "killed": "its process was ended by SIGKILL, as where memory runs out",
    "nan": "returned nan (float), no finite number",
    "text": "returned '1.0' (str), no finite number",
    "list": "returned [1.0] (list), no finite number",
}
NUMBERS = {"none": None, "true": 1.0, "numpy": 2.0, "print": 5.0, "fork": 4.0}


def test_whatever_a_reward_does_is_a_fault_of_that_reply_alone(make_pool):
    pool = make_pool({"function": f"{ODD}:odd", "time_limit": 1.0}, {"function": "exact_match"})
    texts = [*FAULTS, *NUMBERS]
    texts = [text for one in texts for text in (one, "4")]
    began = time.monotonic()
    scores = pool.score([reply(text) for text in texts])
    assert time.monotonic() - began < 20
    for text, score in zip(texts, scores, strict=True):
        if text in FAULTS:
            assert score == Score(None, {"odd": None, "exact_match": score.parts["exact_match"]}, {"odd": FAULTS[text]})
        else:
            value = NUMBERS.get(text, 1.0)
            assert score.parts == {"odd": value, "exact_match": float(text == "4")}, (text, score)
            assert score.faults == {}
    assert pool.score([reply("4")])[0].total == 2.0, "the pool goes on"


def test_the_time_limit_is_of_each_reply_and_not_of_a_chunk(make_pool):
    pool = make_pool({"function": f"{ODD}:odd", "time_limit": 0.5}, num_workers=1)
    began = time.monotonic()
    scores = pool.score([reply(text) for text in ["warm", *"abcd" * 10, "hang", "e"]])
    assert [index for index, score in enumerate(scores) if score.faults] == [41]
    assert time.monotonic() - began < 5


def test_children_of_a_worker_end_with_it(make_pool):
    pool = make_pool({"function": f"{ODD}:hangs_in_a_child", "time_limit": 0.5}, num_workers=1)
    assert pool.score([reply("x")])[0].faults == {"hangs_in_a_child": "took longer than 0.5 s"}
    pool.close()
    assert not [one for one in psutil.Process().children(recursive=True) if "environments.worker" in str(one.cmdline())]


def test_workers_that_cannot_start_let_replies_fail_and_not_the_run(make_pool, monkeypatch):
    pool = make_pool({"function": f"{ODD}:half"})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    scores = pool.score([reply("a"), reply("b")])
    assert [score.faults["half"] for score in scores] == ["no worker can be started: its process ended with code 1"] * 2


def test_workers_never_import_torch(make_pool):
    assert make_pool({"function": f"{ODD}:has_torch"}).score([reply("x")])[0].total == 0.0


@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        ({"function": "exactly"}, ROW, r"rewards\[0\].function=exactly: must be one of exact_match, "),
        ({"function": "numeric", "options": {"column": "b"}}, ROW, r"rewards\[0\].options.column=b: no row .* answer"),
        ({"function": "length", "options": {"buffer": 200}}, ROW, r"rewards\[0\].options.buffer=200: must be from 1"),
        ({"function": f"{ODD}:choosy", "options": {"level": "4"}}, ROW, r"rewards\[0\].options.level=4: .* try 3"),
        ({"function": "code", "time_limit": 5}, {"tests": "x"}, r"rewards\[0\].time_limit=5: must be above the 5 s"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_scored(make_pool, reward, row, message):
    with pytest.raises(BadInput, match=message):
        make_pool(reward).check([row], 100)


def test_all_wrong_functions_are_told_at_once(make_pool):
    with pytest.raises(BadInput, match=r"(?s)grpo.rewards\[0\].function=a.*\n.*grpo.rewards\[1\].options.tol"):
        make_pool({"function": "a"}, {"function": "numeric", "options": {"tol": 1}}).check([ROW], 100)


def test_names_are_distinct():
    functions = ("numeric", "mine:numeric", "other:numeric", "mine:numeric_2", "mine:reward_model", "mine:environment")
    assert part_names([RewardConfig(function=one) for one in functions]) == (
        "numeric", "numeric_2", "numeric_3", "numeric_2_2", "reward_model_2", "environment_2",
    )  # fmt: skip


def test_a_failing_callback_leaves_a_pool_that_works(make_pool):
    pool = make_pool({"function": f"{ODD}:odd"})

    def fail(index, score):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        pool.score([reply("x")] * 100, fail)
    assert [score.total for score in pool.score([reply("xy"), reply("")])] == [2.0, 0.0]


PARENT = f"""
from configs.sections.reward import RewardConfig
from trainer.environments.rewards.reply import Reply
from trainer.environments.scoring import RewardPool
options = {{"isolation": "limits", "seconds": 90}}
rewards = [RewardConfig(function="code", options=options, time_limit=100),
           RewardConfig(function="{ODD}:odd", time_limit=100)]
replies = [Reply("```python\\nwhile True:\\n    pass\\n```", {{"tests": "1"}}, [], 1, 1, False),
           Reply("ignore signals", {{}}, [], 1, 1, False)]
RewardPool(rewards, 2).score(replies)
"""


def test_nothing_outlives_a_parent_that_is_killed(root_directory):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=root_directory)
    try:
        deadline = time.monotonic() + 20
        busy = []
        while time.monotonic() < deadline and len(busy) < 2:  # one in the sandbox, one in the reward itself
            time.sleep(0.1)
            children = psutil.Process(parent.pid).children(recursive=True)
            busy = [one for one in children if one.cpu_times().user > 0.5]
        assert len(busy) == 2, children
        os.kill(parent.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
    finally:
        parent.kill()
        parent.wait()


@pytest.fixture
def root_directory(request):
    return request.config.rootpath
