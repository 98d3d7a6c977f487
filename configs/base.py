"""Every field of a run, with its unit and default. Other configs start from this one and override.

python -m ctxjax.main --config=configs/tiny.py --config.train.steps=50 --workdir=/tmp/run
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # root of all randomness of the run: sampling, data order
    config.task = "qa_jsonl"  # which task's rows and grader: the name of one of the last sections here

    # Compiled programs are kept in this folder, so that a second run starts at once; "": not kept.
    config.compile_cache = "~/.cache/ctxjax/xla"

    config.slice = ""  # the TPU slice that the run is meant for, such as v5e:4x4; python -m ctxjax.plan reads it
    config.cpu_devices = 0  # devices that a CPU counts as; 0: one per core, a power of two up to 8

    config.model = ConfigDict()
    # The student, and the frozen teacher where it has none of its own: a Hugging Face folder, or a Hub id "org/name" or
    # "org/name@revision".
    config.model.path = ""
    # Of activations and matrix products: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPUs.
    config.model.dtype = "auto"
    config.model.param_dtype = "float32"  # of the weights; adapters are float32 always
    # What computes attention over whole sequences: "reference" (plain products), "splash" (TPUs), "cudnn" (GPUs), or
    # "auto": a kernel where the devices have one and the model computes in bfloat16, else the reference. On an H200
    # cuDNN's is 4 to 19 times as fast; splash was not timed (models/kernels.py says what was checked).
    config.model.attention = "reference"
    # What layers keep for the backward pass; the rest is recomputed. "none": all is kept; "dots": products with
    # weights; "full": a layer's input, for a third more arithmetic; "offload": that, in the host's memory.
    config.model.remat = "none"

    # A frozen teacher of its own, often larger. It reads the student's prompts, so the tokenizers must be the same, and
    # responses end at the end tokens of either model.
    config.teacher = ConfigDict()
    config.teacher.path = ""  # its folder; "": the student's initial weights teach, and are held once
    config.teacher.param_dtype = config.model.get_oneway_ref("param_dtype")  # of its weights; "bfloat16" halves them
    config.teacher.offload = False  # whether they wait in the hosts' memory between the teacher's passes

    config.lora = ConfigDict()  # low-rank adapters: W + alpha / rank * A @ B, of which only A and B are trained
    config.lora.rank = 0  # 0: all weights are trained
    config.lora.alpha = 32.0
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # matrices that have an adapter

    # A base model to be trained from scratch first, where model.path is empty. See configs/tiny.py.
    config.base = ConfigDict()
    config.base.seed = config.get_oneway_ref("seed")  # of its initial weights and training text
    config.base.cache = "~/.cache/ctxjax"  # folder; bases are kept here under a hash of their configuration
    config.base.steps = 0  # optimiser steps; 0: there is no base to train
    config.base.batch_size = 64  # rows per step
    config.base.lr = 2e-3  # peak learning rate; warm-up and cosine to 0
    config.base.warmup_steps = 100
    config.base.weight_decay = 0.05
    config.base.width = 128  # model width D
    config.base.layers = 4
    config.base.query_heads = 4
    config.base.kv_heads = 2
    config.base.head_dim = 32
    config.base.mlp_width = 352
    config.base.rope_theta = 10000.0

    # A teacher to be trained from scratch likewise, where teacher.path is empty; what is not set is as in config.base.
    config.teacher_base = ConfigDict()
    for name in config.base:
        config.teacher_base[name] = config.base.get_oneway_ref(name)
    config.teacher_base.steps = 0  # 0: there is none to train

    config.mesh = ConfigDict()  # devices along each axis; -1, in at most one place: all that remain
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1
    # Groups of devices with fast links inside and a slower network between them, over which "data" alone is spread;
    # 0: as many as the devices say (TPU slices).
    config.mesh.slices = 0

    config.prompt = ConfigDict()
    # Where the context stands: as the "system" message; in the "user" turn, a blank line ahead of the question; or as a
    # "prefix", its bare text before the whole rendered chat, behind the begin token (for a completions API).
    config.prompt.placement = "system"
    config.prompt.date = "26 Jul 2024"  # today, to templates that write the date (Llama 3): the clock is never asked
    config.prompt.thinking = config_dict.placeholder(bool)  # Qwen3's enable_thinking; unset: the template's default
    config.prompt.max_bare_tokens = 0  # tokens of a prompt without context; 0: as long as the longest row
    config.prompt.max_context_tokens = 0  # tokens of a prompt with context; 0: likewise
    config.prompt.overlong = "error"  # a longer row: "error", or "drop" (counted). Never cut.

    config.rollout = ConfigDict()
    config.rollout.max_tokens = 512  # tokens of a response, end token included
    config.rollout.temperature = 1.0  # also divides the logits in the losses
    config.rollout.top_k = 0  # 0: off
    config.rollout.top_p = 1.0  # 1: off
    # Where weights lie meanwhile: "gathered" over the mesh's fsdp axis once before the first token, which takes memory
    # for all of them (over tensor), or "stored" as they are, and gathered for every token.
    config.rollout.weights = "gathered"

    # How the teacher draws the responses, with the context, that off-policy steps learn from: once for all arms, and
    # kept in the workdir's teacher_samples.jsonl.
    config.teacher.temperature = config.rollout.get_oneway_ref("temperature")
    config.teacher.top_k = config.rollout.get_oneway_ref("top_k")
    config.teacher.top_p = config.rollout.get_oneway_ref("top_p")

    config.loss = ConfigDict()  # ctxjax/distill/losses.py explains every field
    # Of L_distill; or "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl".
    # "cross_entropy": of the tokens of the teacher's samples, without its distributions (on_policy_fraction 0).
    config.loss.divergence = "reverse_kl"
    config.loss.alpha = 0.5  # of jsd (the teacher's weight) and of the skewed ones (the share that is not mixed)
    config.loss.support = "full"  # tokens L_distill sums over: "full", "teacher_top_k", "student_top_k", "union_top_k"
    config.loss.top_k = 256  # tokens of those supports
    config.loss.remainder = "renormalise"  # what becomes of the mass outside: or "tail", or "raw"
    config.loss.beta = 0.0  # weight of the anchor, nats per nat
    config.loss.beta_ramp = 0  # steps in which it rises to that
    config.loss.anchor = "bare"  # what q_c is held to: or "ema", "teacher_bare", "joint", "symmetric", "teacher"
    config.loss.anchor_every = 1  # steps from one that is anchored to the next, which weighs as much as all of them
    config.loss.gate = "none"  # anchor everywhere, or by agreement of q_x and teacher: per "token", per "response"
    config.loss.gate_threshold = 0.9  # share of a response's tokens that must agree
    config.loss.mu = 0.0  # weight of retention, nats per nat
    config.loss.mu_ramp = 0  # steps in which it rises to that
    config.loss.reference = 0.0  # weight of KL(q_x || teacher without context), nats per nat
    config.loss.clip = 0.0  # nats per token at which L_distill is cut; 0: not
    config.loss.skip_first = 0  # first response tokens that are not trained on
    config.loss.masked_ids = ()  # token ids that are not trained on
    config.loss.drop_truncated = False  # whether responses cut at the length limit are left out
    config.loss.teacher = "frozen"  # or "ema": the student's own moving average
    config.loss.ema_decay = 0.99  # per step, of that average and of the "ema" anchor
    config.loss.on_policy_fraction = 1.0  # chance of a step to learn from the student's samples; else the teacher's
    config.loss.off_policy_steps = 0  # first steps on the teacher's samples
    config.loss.averaging = "token_mean"  # or "sequence_mean"
    config.loss.chunk = 128  # response columns that have logits at one time

    config.optim = ConfigDict()
    config.optim.lr = 5e-6
    config.optim.schedule = "constant"  # or "cosine", to 0 at the last step
    config.optim.warmup_steps = 0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.01
    config.optim.clip = 1.0  # global norm of the gradient

    config.train = ConfigDict()
    config.train.steps = 50  # optimiser steps, one rollout batch each
    config.train.batch_size = 128  # questions of a global batch, one response each
    config.train.micro_batches = 1  # parts of a batch whose gradients are made one after the other: less memory
    config.train.retention_rows = 0  # rows under other contexts in a batch, where mu > 0; 0: batch_size
    config.train.save_every = 50  # steps between checkpoints; the last step, and the best one so far, are always saved
    config.train.keep = 2  # latest checkpoints kept, beside the best one
    config.train.log_every = 1  # steps between rows of metrics.jsonl

    config.eval = ConfigDict()
    config.eval.every = 10  # steps between evaluations on the dev split; 0: never
    config.eval.batch_size = 256  # questions decoded at a time
    config.eval.temperature = 0.0  # 0: greedy
    # Responses to a question in each view; more than one need a temperature. Harm is then reported beside its floor,
    # what two samples of the same view disagree on.
    config.eval.samples = 1
    config.eval.top_k = 0
    config.eval.top_p = 1.0
    config.eval.bootstrap = 2000  # resamples of a paired bootstrap interval
    # The dev metric of which the best checkpoint is kept, and measured on the test split beside the last step's: the
    # higher the better or, with a minus sign before it ("-distill"), the lower; the later of equals.
    config.eval.select = "both_correct"

    # What a run warns of, once each (ctxjax/monitoring/alarms.py). A threshold of 0 switches its alarm off.
    config.alarms = ConfigDict()
    # Those that end the run. All: "not_finite" (loss or gradient; such a step is skipped), "no_end" (not one response
    # ends), and the names of the thresholds below.
    config.alarms.stop = ("not_finite",)
    config.alarms.patience = 3  # steps in a row that are too much
    config.alarms.untrained = 0.5  # share of responses without a token that is trained on
    config.alarms.logprob_gap = 0.05  # between sampling and scoring, mean nats per token
    config.alarms.truncated = 0.5  # share of responses cut at the length limit
    config.alarms.repetition = 0.3  # share of runs of 8 tokens that occurred before in the same response
    config.alarms.no_distillation = 1e-6  # L_distill, nats per token, that is as good as none: no context?
    config.alarms.parse_rate = 0.3  # fall of the share of readable dev answers, from its best
    config.alarms.agreement = 0.2  # fall of the smoothed top1_agreement of student and teacher, from its best

    # The arms: name -> what it changes in config.loss. All start from the same base, seed and data order.
    config.arms = ConfigDict()
    config.arms.opcd = ConfigDict({"beta": 0.0, "mu": 0.0})
    config.arms.off_policy = ConfigDict({"divergence": "forward_kl", "on_policy_fraction": 0.0})
    config.arms.sft = ConfigDict({"divergence": "cross_entropy", "on_policy_fraction": 0.0})
    config.arms.opcd_anchored = ConfigDict({"beta": 0.5, "mu": 0.0})
    config.arms.opcd_retained = ConfigDict({"beta": 0.5, "mu": 1.0})
    config.run_arms = ("opcd", "opcd_anchored", "opcd_retained")  # which of them to run, in this order

    config.rules = ConfigDict()  # the built-in world of substitution tables
    config.rules.seed = config.get_oneway_ref("seed")  # of the world: tables, questions, splits
    config.rules.context_index = 0  # which table is internalized, 0 to 7
    config.rules.train_questions = 4096
    config.rules.dev_questions = 128
    config.rules.test_questions = 512
    config.rules.empty_share = 0.0  # of the base's training rows without a table: with an empty context block, not none

    config.records = ConfigDict()  # of all files of rows: what becomes of a row that cannot be used
    # Kinds that are left out and counted; others are an error that names the row: "unreadable" (no valid JSON, CSV
    # or UTF-8), "missing" (no column, null, empty), "not_text", "huge", "label" (none that its column can have),
    # "duplicate", "conflict" (one question, with two answers).
    config.records.skip = ("duplicate",)
    config.records.max_skipped = 100  # rows; more of them are an error
    config.records.max_text = 1_000_000  # characters; longer texts are "huge"

    config.qa_jsonl = ConfigDict()  # questions in a local .jsonl, .parquet or .csv file
    config.qa_jsonl.path = ""  # the file
    config.qa_jsonl.question = "question"  # column
    config.qa_jsonl.reference = "answer"  # column
    config.qa_jsonl.grading = "numeric"  # the last number; or "exact", "math", "letter", "yes_no"
    config.qa_jsonl.limit = 0  # first rows read; 0: all
    config.qa_jsonl.dev_questions = 64  # held out by a hash of the question
    config.qa_jsonl.test_questions = 64

    config.medical = ConfigDict()  # multiple choice as in MedMCQA: the letter in <answer> tags
    config.medical.first_label = 0  # what cop is where option A is right: 0 in the Hub's files, 1 in the authors'
    config.medical.ask_format = True  # whether the question asks for the tags; else only a context can

    config.safety = ConfigDict()  # offensive and hateful language, three public sets pooled: yes or no in <answer> tags
    config.safety.path = ""  # folder with the sets' published files; ctxjax/data/safety_sets.py names them
    config.safety.sets = ("tweeteval", "hatecheck", "ethos")  # which of them
    config.safety.ask_format = True

    config.math = ConfigDict()  # problems as in GSM8K and DAPO-Math, by the value of the answer
    config.math.ask_format = True  # whether the question asks for a boxed answer

    config.hints = ConfigDict()  # any rows, each with a context of its own
    config.hints.question = "question"  # column
    config.hints.reference = "answer"  # column
    config.hints.hint = "answer"  # column of what the teacher may see
    config.hints.template = "A solution that may help, which the user does not see:\n\n{hint}"  # the context
    config.hints.grading = "math"  # as qa_jsonl.grading

    config.tiny_safety = ConfigDict()  # the texts of safety as a world with a base of its own
    config.tiny_safety.path = config.safety.get_oneway_ref("path")
    config.tiny_safety.seed = config.get_oneway_ref("seed")  # of the contexts, and which of them are held out
    config.tiny_safety.vocabulary = 4096  # tokens of the byte-level BPE that is trained on the texts
    config.tiny_safety.longest = 32  # tokens of a text; longer ones are left out, and counted
    config.tiny_safety.train_questions = 0  # at most; 0: all
    config.tiny_safety.dev_questions = 256
    config.tiny_safety.test_questions = 0

    for section in (config.medical, config.math, config.hints):
        # A JSONL, Parquet or CSV file, a pattern of several, or files of a Hub data set, "org/name:PATTERN" (with
        # "@revision" behind the name).
        section.path = ""
        section.test_path = ""  # likewise, where test questions have files of their own; "": a fifth of the questions
        section.limit = 0  # first rows read of each file; 0: all
    for section in (config.medical, config.safety, config.math, config.hints):
        section.train_questions = 0  # at most; 0: all
        section.dev_questions = 128  # at most, of a tenth that is held out by the question's hash; 0: all
        section.test_questions = 500

    # The context to internalize comes from one of the first four.
    for section in (config.qa_jsonl, config.medical, config.safety, config.math):
        section.context = ""  # inline
        section.context_file = ""  # a text file
        section.context_files = ()  # or several: every row has one of them, drawn by context_seed and its id
        section.context_seed = config.get_oneway_ref("seed")
    for section in (config.qa_jsonl, config.medical, config.math):
        section.context_column = ""  # or a column of the data, which holds each row's own
    for section in (config.qa_jsonl, config.medical, config.safety, config.math, config.hints):
        # Other contexts, to keep obeying (retention) and to measure obedience with: "builtin", the 72 of
        # ctxjax/data/other_contexts.jsonl, or a file like it; "": none. Every second one is held out from training.
        section.other_contexts_file = "builtin"
    return config
