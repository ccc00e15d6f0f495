"""What exits cost: layers per token, decoder FLOPs, expected and worst work, batches, and measured times.

Counted from recorded exit layers (B, T): prompts by generated tokens, each 1..L, with 0 after the last token of a prompt.
The token that ends an output counts, the prompt does not. Layers and FLOPs are no time: `speed_table` holds them against a
clock.
"""

from riskcal.efficiency.flops import BATCH_MODES as BATCH_MODES
from riskcal.efficiency.flops import PREDICTORS as PREDICTORS
from riskcal.efficiency.flops import BatchCosts as BatchCosts
from riskcal.efficiency.flops import BatchWork as BatchWork
from riskcal.efficiency.flops import DecoderDimensions as DecoderDimensions
from riskcal.efficiency.flops import Flops as Flops
from riskcal.efficiency.flops import Work as Work
from riskcal.efficiency.flops import batch_work as batch_work
from riskcal.efficiency.flops import decoder_flops as decoder_flops
from riskcal.efficiency.flops import exit_shares as exit_shares
from riskcal.efficiency.flops import expected_work as expected_work
from riskcal.efficiency.flops import fit_batch_costs as fit_batch_costs
from riskcal.efficiency.flops import head_ratio as head_ratio
from riskcal.efficiency.flops import head_sizes as head_sizes
from riskcal.efficiency.flops import layers_per_token as layers_per_token
from riskcal.efficiency.flops import speed_table as speed_table
from riskcal.efficiency.flops import token_flops as token_flops
