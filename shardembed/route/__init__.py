"""Step 2 and 6 of the journey: who owns which id, what to ask them, and how their answers become outputs. No communication."""

from shardembed.route.combine import combine
from shardembed.route.ownership import Atlas
from shardembed.route.segments import Route, SlabRoute, empty_route, make_route

__all__ = ["Atlas", "Route", "SlabRoute", "combine", "empty_route", "make_route"]
