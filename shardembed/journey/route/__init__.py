"""Stages 2 and 6 of the journey: who owns which id, what to ask them, and how their answers become outputs. No communication."""

from shardembed.journey.route.combine import combine
from shardembed.journey.route.ownership import RoutingTable
from shardembed.journey.route.segments import Route, SlabRoute, empty_route, make_route

__all__ = ["Route", "RoutingTable", "SlabRoute", "combine", "empty_route", "make_route"]
