"""Many runs: a grid of recipes, planned, and made by processes here or by Ray's workers.

grid      what is asked for: axes, exclusions, and the recipe of each cell
plan      which runs that is, where they lie, which of them are to be made
work      makes them: what is waiting, running, finished and failed
local, on_ray   where: processes of this machine, tasks of a Ray cluster
estimate  how long it would take
"""
