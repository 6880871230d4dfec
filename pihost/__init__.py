"""The child's side of pisupervisor: standard library only, auditable in one sitting.

What runs before the walls are up lives here; what runs beside hostile code lives in ``pihost.inside``.
"""
