"""What decoders write down: `Runs` (one row per prompt and candidate) and `Traces` (one row per generated token)."""

from riskcal.records.candidates import on_curves as on_curves
from riskcal.records.candidates import only_threshold as only_threshold
from riskcal.records.candidates import varying as varying
from riskcal.records.costs import COSTS as COSTS
from riskcal.records.order import content_order as content_order
from riskcal.records.order import content_prints as content_prints
from riskcal.records.order import fitted_on as fitted_on
from riskcal.records.order import numbered as numbered
from riskcal.records.order import numbered_order as numbered_order
from riskcal.records.order import prints_of as prints_of
from riskcal.records.order import row_prints as row_prints
from riskcal.records.order import tested_order as tested_order
from riskcal.records.reducing import reduce as reduce
from riskcal.records.runs import OBJECTIVES as OBJECTIVES
from riskcal.records.runs import Runs as Runs
from riskcal.records.tokens import TokenLosses as TokenLosses
from riskcal.records.tokens import holds_tokens as holds_tokens
from riskcal.records.traces import Traces as Traces

# these look at all of the above, so that their place is last
# isort: split
from riskcal.records import check as check
from riskcal.records import formats as formats
