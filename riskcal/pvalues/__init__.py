"""P-values of H: E[L] > delta for bounded losses; a small one says that the expected loss is at most delta.

Every function takes losses (n,) or (n, k), one row per independent unit, and returns a float or (k,). Losses may lie in
any declared [lower, upper]; they and delta are mapped to the unit interval first.
"""

from riskcal.pvalues.bernstein import clt as clt
from riskcal.pvalues.bernstein import empirical_bernstein as empirical_bernstein
from riskcal.pvalues.bernstein import predictable_bernstein as predictable_bernstein
from riskcal.pvalues.bettor import betting as betting
from riskcal.pvalues.methods import BY_NAME as BY_NAME
from riskcal.pvalues.methods import Bentkus as Bentkus
from riskcal.pvalues.methods import Betting as Betting
from riskcal.pvalues.methods import Binomial as Binomial
from riskcal.pvalues.methods import ConvexOrder as ConvexOrder
from riskcal.pvalues.methods import EmpiricalBernstein as EmpiricalBernstein
from riskcal.pvalues.methods import Hoeffding as Hoeffding
from riskcal.pvalues.methods import HoeffdingBentkus as HoeffdingBentkus
from riskcal.pvalues.methods import Method as Method
from riskcal.pvalues.proxies import betting_with_proxy as betting_with_proxy
from riskcal.pvalues.sampled import sample_size as sample_size
from riskcal.pvalues.sums import OF_SUMS as OF_SUMS
from riskcal.pvalues.sums import Sums as Sums
from riskcal.pvalues.sums import bentkus as bentkus
from riskcal.pvalues.sums import binomial as binomial
from riskcal.pvalues.sums import convex_order as convex_order
from riskcal.pvalues.sums import hoeffding as hoeffding
from riskcal.pvalues.sums import hoeffding_bentkus as hoeffding_bentkus
