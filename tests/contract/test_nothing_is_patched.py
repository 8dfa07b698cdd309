"""The SDK that a user imports stays the SDK as it was shipped, whatever of ours is connected."""

from __future__ import annotations

import pytest

from examples.run_on_server import Server
from tests.support.live import environment, key_of, python

SCRIPT = '''
import sys, types
import tinker, tinker.lib.public_interfaces.rest_client

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "tinker":
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                found[name, attribute] = id(value)
            elif isinstance(value, type) and value.__module__.partition(".")[0] == "tinker":
                found |= {(name, attribute, key): id(inner) for key, inner in vars(value).items()}
    return found

before = snapshot()
assert len(before) > 1000
import IPython
shell = IPython.InteractiveShell.instance()
shell.run_line_magic("load_ext", "tuft_jupyter")
import tuft_jupyter
tuft_jupyter.init()
training = tuft_jupyter.create_training_client(base_model="tuft/demo", rank=4).result()
assert type(training) is tinker.TrainingClient
def changed():
    after = snapshot()
    return sorted(key for key in before if after.get(key) != before[key])

connected = changed()
cell = """
datum = tinker.types.Datum(model_input=tinker.types.ModelInput.from_ints([101, 42]),
                           loss_fn_inputs={"target_tokens": [42, 37]})
training.forward_backward([datum], "cross_entropy").result()
inside = changed()
training.optim_step(tinker.types.AdamParams()).result()
"""
shell.user_ns |= globals()
shell.run_cell_magic("tuft_train", "", cell)
print(connected, shell.user_ns["inside"], changed())
'''


@pytest.mark.timeout(180)
def test_nothing_of_the_sdk_is_replaced(alice: Server) -> None:
    """S1-66: every function and class attribute of tinker is as it was, after init() and in a training cell."""
    env = environment(alice.work, TUFT_ADDRESS=f"{alice.url}tuft", TUFT_API_KEY=key_of(alice.work))
    done = python(SCRIPT, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[] [] []"
