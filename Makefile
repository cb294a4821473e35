# The commands of everyday work. `make` alone lists them; every one that needs the environment builds it first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
STAMP := .venv/.installed
CODE := configs parallel trainer launch tools tests

LONG := --data data/stdlib/validation --lengths 256,512,1024,2048 --digits 2 --keys 10
TWO_RANKS := $(PYTHON) -m launch.local --nproc-per-node 2
# Tests of one file stay together, as they share what they set up.
TWO_PROCESSES := -n 2 --dist loadfile
LONG_ROPE := model.rope.base=2.0e+4
# One thread a rank: CPU ranks that each start a thread per core fight for the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo pretrain demo-long-context demo-sft demo-preference demo-online-dpo demo-reward demo-distill demo-grpo demo-ppo demo-calculator test test-cluster test-fast bench lint format types clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## build .venv from constraints.txt (again only when that or pyproject.toml changes)

$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	@tools/make_venv.sh
	@touch $@

demo: setup  ## the whole road: pretrain, long context, fine-tune, reinforce, export, chat; goes on where it stopped
	test -e runs/demo_long/long_context || $(MAKE) demo-long-context
	test -e data/tasks || $(PYTHON) tools/make_small_tasks.py --out data/tasks
	$(TWO_RANKS) launch/sft.py configs/demo/sft.yaml $(LONG_ROPE) run.name=demo_chat checkpoint.init_from=runs/demo_long
	$(TWO_RANKS) launch/grpo.py configs/demo/grpo.yaml $(LONG_ROPE) run.name=demo_policy \
	    checkpoint.init_from=runs/demo_chat/checkpoints/step_00000120
	test -e runs/demo_policy_hf || $(PYTHON) tools/convert_hf.py export runs/demo_policy runs/demo_policy_hf
	$(PYTHON) tools/chat.py runs/demo_policy_hf --prompts data/tasks/held_out.jsonl --temperature 0 --out runs/demo_answers.jsonl
	head -n 5 runs/demo_answers.jsonl

pretrain: setup  ## train a small language model on 4 CPU ranks, tensor x pipeline parallel
	$(PYTHON) tools/prepare_corpus.py --out data/stdlib
	$(PYTHON) -m launch.local --nproc-per-node 4 launch/pretrain.py configs/demo/pretrain.yaml

demo-long-context: setup  ## continue that model at eight times its length, and measure what it makes of long texts
	test -e runs/demo/checkpoints/latest || $(MAKE) pretrain
	$(PYTHON) tools/make_passkeys.py data/stdlib/train --tokenizer data/stdlib/tokenizer --out data/passkeys --digits 2
	$(PYTHON) tools/eval_long_context.py runs/demo $(LONG) --out runs/demo/long_context
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/long_context.py configs/demo/long_context.yaml
	$(PYTHON) tools/eval_long_context.py runs/demo_long $(LONG) --out runs/demo_long/long_context

demo-sft: setup  ## fine-tune that model on small questions, and ask it others before and after
	test -e runs/demo/checkpoints/latest || $(MAKE) pretrain
	$(PYTHON) tools/make_small_tasks.py --out data/tasks
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/sft.py configs/demo/sft.yaml

demo-preference: setup  ## teach that model by pairs of a right and a wrong answer, and ask it before and after
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) tools/make_small_tasks.py --tasks pairs --rows 3000 --out data/pairs
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/preference.py configs/demo/preference.yaml

demo-online-dpo: setup  ## teach that model by pairs of its own answers in three rounds, and ask it before and after
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/online_dpo.py configs/demo/online_dpo.yaml

demo-reward: setup  ## make a reward model of that model from such pairs: how often it prefers the right answer
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) tools/make_small_tasks.py --tasks pairs --rows 3000 --out data/pairs
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/reward.py configs/demo/reward.yaml

demo-distill: setup  ## teach a model half the size what that model says of each token, beside one that has labels alone
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) tools/make_small_tasks.py --rows 1000 --out data/few_tasks
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/distill.py configs/demo/distill.yaml
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/distill.py configs/demo/distill.yaml \
	    run.name=demo_labels distill.label_weight=1

demo-grpo: setup  ## reward that model for right answers, from where fine-tuning left it
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/grpo.py configs/demo/grpo.yaml

demo-ppo: setup  ## the same with a critic: PPO
	test -e runs/demo_sft/checkpoints/latest || $(MAKE) demo-sft
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/ppo.py configs/demo/ppo.yaml

demo-calculator: setup  ## teach the model of long texts to ask a calculator, and reward it for right answers
	test -e runs/demo_long/checkpoints/latest || $(MAKE) demo-long-context
	test -e data/calculator/tokenizer || $(PYTHON) tools/split_digits.py data/stdlib/tokenizer --out data/calculator/tokenizer
	$(PYTHON) tools/make_small_tasks.py --tasks calculator --digits 2 --out data/calculator
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/sft.py configs/demo/calculator_sft.yaml
	$(PYTHON) -m launch.local --nproc-per-node 2 launch/grpo.py configs/demo/calculator_grpo.yaml

test: setup  ## run every test
	$(PYTHON) -m pytest $(TWO_PROCESSES) --ignore=tests/cluster

test-cluster: setup  ## run jobs in a SLURM on this machine, which is installed where it is missing (root, Debian)
	tests/cluster/slurm_lab.sh install
	$(PYTHON) -m pytest tests/cluster

test-fast: setup  ## run the tests that take seconds
	$(PYTHON) -m pytest $(TWO_PROCESSES) -m "not slow" --ignore=tests/cluster

bench: setup  ## measure tokens/s against bare megatron-core, Hugging Face Trainer and TRL, and what else tools/bench/ has
	$(PYTHON) tools/bench/throughput.py
	$(PYTHON) tools/bench/sft.py
	$(PYTHON) tools/bench/conversion.py
	$(PYTHON) tools/bench/context_parallel.py
	$(PYTHON) tools/bench/preference.py
	OMP_NUM_THREADS=1 $(PYTHON) tools/bench/generation.py
	$(PYTHON) tools/bench/grpo.py

lint: setup  ## check style and formatting
	$(PYTHON) -m ruff check $(CODE)
	$(PYTHON) -m ruff format --check $(CODE)

format: setup  ## rewrite the code in the project's format
	$(PYTHON) -m ruff check --fix $(CODE)
	$(PYTHON) -m ruff format $(CODE)

types: setup  ## check the types
	$(PYTHON) -m mypy

clean:  ## remove environments and caches (data/ and runs/ stay)
	rm -rf .venv .venv-bootstrap .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
