"""What a run will need before it is queued: memory a GPU, time, GPU-hours, cost, disk, and the discount against full length.

Everything here is predicted from the recipe, the architecture and published measurements; nothing touches a GPU.
"""

from endprompt.planning.cluster import Cluster
from endprompt.planning.plan import Plan, make_plan

__all__ = ["Cluster", "Plan", "make_plan"]
