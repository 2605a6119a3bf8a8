"""The studies of *Self-Distillation*, section 5 and Fig. 8, for any network with one or more exits."""

from shoal.analysis.studies import STUDIES, Result, Subject, write

__all__ = ["STUDIES", "Result", "Subject", "write"]
