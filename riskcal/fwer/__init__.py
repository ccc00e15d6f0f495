"""Which hypotheses may be rejected together, so that a false rejection happens with probability at most epsilon.

The functions take p-values (k,) in the order in which they are to be tested and return a boolean (k,): rejected, that is,
certified. The objects of the same names are what `riskcal.calibrate` takes as ``procedure``, each with its own options.
"""

from riskcal.fwer.procedures import BY_NAME as BY_NAME
from riskcal.fwer.procedures import Bonferroni as Bonferroni
from riskcal.fwer.procedures import Fallback as Fallback
from riskcal.fwer.procedures import FixedSequence as FixedSequence
from riskcal.fwer.procedures import Graphical as Graphical
from riskcal.fwer.procedures import Hochberg as Hochberg
from riskcal.fwer.procedures import Holm as Holm
from riskcal.fwer.procedures import Pareto as Pareto
from riskcal.fwer.procedures import PilotOrder as PilotOrder
from riskcal.fwer.procedures import Procedure as Procedure
from riskcal.fwer.rules import bonferroni as bonferroni
from riskcal.fwer.rules import fallback as fallback
from riskcal.fwer.rules import fixed_sequence as fixed_sequence
from riskcal.fwer.rules import graphical as graphical
from riskcal.fwer.rules import hochberg as hochberg
from riskcal.fwer.rules import holm as holm
from riskcal.fwer.rules import initial_levels as initial_levels
