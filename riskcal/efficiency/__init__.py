"""What exits cost: layers per token, decoder FLOPs, expected and worst work, batches, and measured times.

Counted from recorded exit layers (B, T): prompts by generated tokens, each 1..L, with 0 after the last token of a prompt.
The token that ends an output counts, the prompt does not. Layers and FLOPs are no time: `speed_table` holds them against a
clock. `capacity` puts together what to plan for.
"""

from riskcal.efficiency.capacity import Capacity as Capacity
from riskcal.efficiency.capacity import capacity as capacity
from riskcal.efficiency.engine import EngineWork as EngineWork
from riskcal.efficiency.engine import engine_work as engine_work
from riskcal.efficiency.flops import PREDICTORS as PREDICTORS
from riskcal.efficiency.flops import DecoderDimensions as DecoderDimensions
from riskcal.efficiency.flops import Flops as Flops
from riskcal.efficiency.flops import decoder_flops as decoder_flops
from riskcal.efficiency.flops import token_flops as token_flops
from riskcal.efficiency.heads import head_ratio as head_ratio
from riskcal.efficiency.heads import head_sizes as head_sizes
from riskcal.efficiency.layers import exit_shares as exit_shares
from riskcal.efficiency.layers import layers_per_token as layers_per_token
from riskcal.efficiency.memory import Memory as Memory
from riskcal.efficiency.memory import memory as memory
from riskcal.efficiency.times import speed_table as speed_table
from riskcal.efficiency.work import BATCH_MODES as BATCH_MODES
from riskcal.efficiency.work import BatchWork as BatchWork
from riskcal.efficiency.work import Work as Work
from riskcal.efficiency.work import batch_work as batch_work
from riskcal.efficiency.work import deepest_row as deepest_row
from riskcal.efficiency.work import expected_work as expected_work
