"""What keeps this machine from giving its GPUs away, or will one day: looked at once, and changed nowhere.

`machine.py` is where things lie; `looks/` reads them; `seen.py` is what was seen; `checks/` judges that; `remedies.py`
knows the commands of each distribution; `examination.py` puts it together. `gpuswitch/cli/doctor.py` shows it.
"""
