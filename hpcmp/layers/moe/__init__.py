"""Mixture of experts: an MLP of which each token uses a few of many experts, which lie on different ranks."""

from .experts import Experts as Experts
from .moe import MixtureOfExperts as MixtureOfExperts
from .router import Router as Router
