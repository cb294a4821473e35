"""Submit a run to SLURM. Run: python launch/slurm.py configs/demo/pretrain.yaml --cluster FILE --nodes 2"""
import shlex
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
import yaml

from configs.load import load_cluster, read_config, resolved_dict
from launch.batch_script import Job, batch_script

recipe, cluster, nodes, run_dir, *overrides = sys.argv[1:]
config, problems = read_config(recipe, [*overrides, f"run.dir={run_dir}"], "pretrain")
print(problems)
job = Job("pretrain", config.run.name, Path(run_dir), Path.cwd(), shlex.join(sys.argv), int(nodes), load_cluster(cluster), sys.executable, False)
job.log_dir.mkdir(parents=True, exist_ok=True)
(job.run_dir / "recipe.yaml").write_text(yaml.safe_dump(resolved_dict(config), sort_keys=False))
job.script.write_text(batch_script(job))
subprocess.run(["sbatch", str(job.script)])
