import json
from rx_edge_bench.deployment_loss import measure
from rx_edge_export.export import silent
import shutil, os
def test_probe(tiny_run, tiny_bundle, tiny_pairs):
    r = measure(tiny_run, tiny_bundle, tiny_pairs, ["gguf:F16","gguf:Q8_0"], threads=1, progress=silent)
    print(json.dumps(r,indent=1))
    for a,b in ((tiny_run,"run"),(tiny_bundle,"bundle"),(tiny_pairs,"pairs")):
        shutil.copytree(a,"/tmp/dl/tiny/"+b)
    for n in ("llama","vit"): pass
    assert 0
