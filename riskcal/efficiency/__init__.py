"""What exits cost: layers per token, decoder FLOPs, expected and worst work, batches, and measured times.

Counted from recorded exit layers (B, T): prompts by generated tokens, each 1..L, with 0 after the last token of a prompt.
The token that ends an output counts, the prompt does not. Layers and FLOPs are no time: `speed_table` holds them against a
clock.
"""

from riskcal.efficiency.flops import PREDICTORS as PREDICTORS
from riskcal.efficiency.flops import DecoderDimensions as DecoderDimensions
from riskcal.efficiency.flops import Flops as Flops
from riskcal.efficiency.flops import decoder_flops as decoder_flops
from riskcal.efficiency.flops import head_ratio as head_ratio
from riskcal.efficiency.flops import head_sizes as head_sizes
from riskcal.efficiency.flops import token_flops as token_flops
from riskcal.efficiency.layers import exit_shares as exit_shares
from riskcal.efficiency.layers import layers_per_token as layers_per_token
from riskcal.efficiency.times import speed_table as speed_table
from riskcal.efficiency.work import BATCH_MODES as BATCH_MODES
from riskcal.efficiency.work import BatchWork as BatchWork
from riskcal.efficiency.work import Work as Work
from riskcal.efficiency.work import batch_work as batch_work
from riskcal.efficiency.work import expected_work as expected_work
