import threading, os, gc
from tests.small_runs import *
def count(place):
    return len(os.listdir("/proc/self/task"))
def look(place):
    import torch.distributed as dist
    n0=count(place); gc.collect(); n1=count(place)
    from torch.distributed import distributed_c10d as c
    pgs=[o for o in gc.get_objects() if isinstance(o, dist.ProcessGroup)]
    out=[]
    for pg in pgs[:30]:
        out.append([ (type(r).__name__, str(r)[:150]) for r in gc.get_referrers(pg) if r is not pgs][:3])
    from megatron.core import parallel_state as p
    left=[k for k,v in vars(p).items() if isinstance(v, dist.ProcessGroup) or (isinstance(v,list) and v and isinstance(v[0],dist.ProcessGroup))]
    gl=len(p._global_process_group_list or [])
    return n0,n1,len(pgs),left,gl,out
def run(place, config):
    with open_engine(place, config) as e:
        stage = build_stage(e)
        from trainer.state import TrainState
        train_steps(e, stage, TrainState(), 1)
def test_it(ranks):
    for world, par in [(2,{"tp":2}),(2,{})]:
        ranks.run(run, small_config(world, parallel=par), world=world)
        r=ranks.run(look, world=2)[0]
        print(r[:-1])
        for x in r[-1]: print("   ",x)
