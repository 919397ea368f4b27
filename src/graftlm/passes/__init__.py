"""One pass of a wrapped base, from the arguments of a call to its output.

    kwargs -> Call -> shortcuts.choose -> padded | seq2seq | packed: lay -> base.forward -> loss -> restore -> output

| file | what it does |
|---|---|
| `state.py` | the objects of a pass: `Call`, `Placed`, `Packed`, `Targets`, `Pass`, and `Run` for one call of a wrapper |
| `facts.py`, `inputs.py` | what is read from a base once; the arguments of a call by name |
| `hooks.py` | the hooks on a base, by which a pass begins and ends |
| `shortcuts.py`, `trial.py` | which short cuts a training pass takes, tried out on the model itself |
| `padded.py`, `seq2seq.py`, `packed.py` | the three layouts of a batch; parts: `prefix.py`, `row.py`, `refusals.py` |
| `loss.py`, `output.py` | the loss from hidden states; outputs whose logits are made when they are read |
| `run.py` | one call: its plan, its pass, what that ends with |
| `served.py` | steps of a server over keys and values that it keeps |

Shapes: B rows, T tokens a row as given, P virtual tokens, K prefix entries, N tokens of a packed row, H hidden size.
"""
