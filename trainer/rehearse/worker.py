"""The process that rehearses ranks: reads a config and ranks as JSON, prints what each did as a line of JSON.

Run: python -m trainer.rehearse.worker, with `parallel.platform.fake.runtime` in front of CUDA's; tools/plan.py does.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict

from configs.stages import STAGE_CONFIGS


def main() -> None:
    """Rehearse the ranks that stdin names and print the outcome of each."""
    asked = json.load(sys.stdin)
    config = STAGE_CONFIGS[asked["stage"]].model_validate(asked["config"])
    from trainer.rehearse.rank import prepare, rehearse

    prepare()
    for rank in asked["ranks"]:
        started = time.perf_counter()
        try:
            outcome = {"error": None, **asdict(rehearse(config, asked["world_size"], rank))}
            groups = {call["group"]: None for call in outcome["calls"]}  # written once, not at every call
            numbers = {group: number for number, group in enumerate(groups)}
            calls = [call | {"group": numbers[call["group"]]} for call in outcome["calls"]]
            outcome |= {"groups": list(groups), "calls": calls}
        except Exception as failure:
            places = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(failure.__traceback__)]
            error = f"{type(failure).__name__}: {failure}"
            outcome = {"error": error, "rank": rank, "places": places[::-1]}
        print(json.dumps(outcome | {"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
