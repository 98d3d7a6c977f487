"""All fields of a run, with units and defaults. Other configs start from this one and override fields.

python -m ctxjax.main --config=configs/tiny.py --config.train.steps=50 --workdir=/tmp/run
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # root of all randomness of the run: sampling, data order
    config.task = "qa_jsonl"  # the task, with its rows and grader: a name in ctxjax/data/tasks/__init__.py

    # Folder of the cache of compiled programs, which lets a second run start quickly; "": no cache.
    config.compile_cache = "~/.cache/ctxjax/xla"

    config.slice = ""  # TPU slice for the run, such as v5e:4x4; read by python -m ctxjax.plan
    config.cpu_devices = 0  # number of JAX devices on a CPU; 0: one per core, rounded down to a power of two, at most 8

    config.model = ConfigDict()  # the student
    # The student, and also the frozen teacher if teacher.path is empty: a Hugging Face folder, or a Hub id "org/name"
    # or "org/name@revision".
    config.model.path = ""
    # Dtype of activations and matrix products: "float32", "bfloat16", or "auto" (bfloat16 on accelerators, float32 on
    # CPUs).
    config.model.dtype = "auto"
    # Dtype of the weights in memory. "bfloat16" only for weights that are not trained: with an adapter, or to evaluate.
    # What is trained, its moments and its moving average are float32; model.dtype may be bfloat16 all the same.
    config.model.param_dtype = "float32"
    # Attention over whole sequences: "reference" (plain products), "splash" (TPUs), "cudnn" (GPUs), or "auto": the
    # kernel of the platform if it can run the model and the model computes in bfloat16, otherwise the reference. A
    # kernel that cannot run the model is an error. Short passes take the reference path. Speed: benchmarks/README.md
    # (accelerator.py); what was checked: ctxjax/models/kernels.py.
    config.model.attention = "auto"
    # What each layer stores for the backward pass; the rest is recomputed. "none": everything is stored, with
    # mesh.fsdp > 1 the gathered weights of all layers, too; "dots": products with weights; "full": only the layer's
    # input, for a third more arithmetic; "offload": the layer's input, in host memory.
    config.model.remat = "none"

    # A separate frozen teacher, often larger. It reads the student's prompts, so the tokenizers must be the same.
    # Responses end at the end tokens of either model.
    config.teacher = ConfigDict()
    config.teacher.path = ""  # folder or Hub id; "": the teacher is the student's initial weights, stored once
    # Dtype of its weights, if it has a path or teacher_base.steps of its own; "bfloat16" halves their memory. A teacher
    # that is the student's initial weights has model.param_dtype.
    config.teacher.param_dtype = config.model.get_oneway_ref("param_dtype")
    config.teacher.offload = False  # keep the teacher's weights in host memory between its passes

    config.lora = ConfigDict()  # low-rank adapters: W + alpha / rank * A @ B; only A and B are trained
    config.lora.rank = 0  # 0: all weights are trained
    config.lora.alpha = 32.0  # the scale of the adapter is alpha / rank
    config.lora.rslora = False  # the scale is alpha / sqrt(rank)
    # Folder of the adapter to start from, in PEFT's format, with the same rank, alpha, targets and rslora; "": a new
    # one. If teacher.path is empty, the teacher has it, too.
    config.lora.init = ""
    config.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # matrices with an adapter

    # A base model that is trained from scratch before the run, if model.path is empty. See configs/tiny.py.
    config.base = ConfigDict()
    config.base.seed = config.get_oneway_ref("seed")  # of its initial weights and training text
    config.base.cache = "~/.cache/ctxjax"  # folder of trained bases; the name of a base has a hash of its configuration
    config.base.family = "llama"  # its architecture; or "qwen2": biases on q, k and v; "qwen3": norms on q and k
    config.base.steps = 0  # optimiser steps; 0: no base
    config.base.batch_size = 64  # rows per step
    config.base.lr = 2e-3  # peak learning rate, after a warm-up and before a cosine decay to 0
    config.base.warmup_steps = 100  # steps in which the rate rises linearly
    config.base.weight_decay = 0.05  # of AdamW
    config.base.width = 128  # model width D
    config.base.layers = 4  # transformer layers
    config.base.query_heads = 4  # attention heads
    config.base.kv_heads = 2  # heads of keys and values, each shared by several attention heads
    config.base.head_dim = 32  # width of a head
    config.base.mlp_width = 352  # width inside the MLP
    config.base.rope_theta = 10000.0  # base of the rotary positions

    # A teacher that is trained from scratch in the same way, if teacher.path is empty. Defaults are those of
    # config.base.
    config.teacher_base = ConfigDict()
    for name in config.base:
        config.teacher_base[name] = config.base.get_oneway_ref(name)
    config.teacher_base.steps = 0  # optimiser steps; 0: no such teacher

    config.mesh = ConfigDict()  # devices along each axis; -1, for at most one axis: all remaining devices
    config.mesh.data = 1  # copies of the weights, each with a part of the batch
    config.mesh.fsdp = -1  # parts of the weights, gathered for each layer, each with a part of the batch
    config.mesh.tensor = 1  # parts of each matrix product
    # Number of slices: groups of devices with fast links inside and a slower network between them. Only "data" spans
    # several slices. 0: as many as the devices report (TPU slices).
    config.mesh.slices = 0

    config.prompt = ConfigDict()  # how questions and contexts become prompts
    # Placement of the context: "system", the system message; "user", in the user's turn before the question, with a
    # blank line between them; "prefix", raw text before the whole rendered chat, after the begin token (for a
    # completions API).
    config.prompt.placement = "system"
    config.prompt.date = "26 Jul 2024"  # today's date for templates that write it (Llama 3); the clock is not used
    config.prompt.thinking = config_dict.placeholder(bool)  # Qwen3's enable_thinking; unset: the template's default
    # The same in prompts with a context block, for a teacher that thinks and a student that does not, or the reverse;
    # unset: as prompt.thinking. The student reads these prompts, too, when the context comes back.
    config.prompt.teacher_thinking = config_dict.placeholder(bool)
    config.prompt.keywords = ()  # other variables of the chat template, such as ("reasoning_effort=low",)
    config.prompt.teacher_keywords = ()  # more of them, in prompts with a context block
    config.prompt.max_bare_tokens = 0  # most tokens of a prompt without context; 0: no limit
    config.prompt.max_context_tokens = 0  # most tokens of a prompt with context; 0: no limit
    config.prompt.overlong = "error"  # a longer row is an error; "drop": leave it out and count it. Never truncated.

    config.rollout = ConfigDict()  # sampling of the student's responses
    config.rollout.max_tokens = 512  # most tokens of a response, end token included
    config.rollout.temperature = 1.0  # also divides the logits in the losses
    config.rollout.top_k = 0  # 0: off
    config.rollout.top_p = 1.0  # 1: off
    # Weight sharding during decoding. "gathered": all-gather over fsdp once before the first token, which needs memory
    # for all weights (sharded only over tensor). "stored": all-gather for every token.
    config.rollout.weights = "gathered"

    # Decoding of the teacher's responses, with the context, for off-policy steps. They are sampled once for all arms
    # and stored in the workdir's teacher_samples.jsonl.
    config.teacher.temperature = config.rollout.get_oneway_ref("temperature")
    config.teacher.top_k = config.rollout.get_oneway_ref("top_k")  # 0: off
    config.teacher.top_p = config.rollout.get_oneway_ref("top_p")  # 1: off
    # The reasoning in these responses: "keep", or "cut" up to </think>, so that the student learns the answer alone,
    # which needs cross_entropy on these samples.
    config.teacher.reasoning = "keep"

    config.loss = ConfigDict()  # the objective; ctxjax/distill/losses.py has the equations
    # Divergence of L_distill; or "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl".
    # "cross_entropy": on the tokens of the teacher's samples, without its distributions; for on_policy_fraction 0.
    config.loss.divergence = "reverse_kl"
    # Divergence of the steps on the teacher's samples in an arm that has others, too, with "cross_entropy" as well; "":
    # the same. What the student never says goes in by "forward_kl", and hardly by "reverse_kl".
    config.loss.off_policy_divergence = ""
    config.loss.alpha = 0.5  # of jsd (the teacher's weight) and of the skewed ones (the share that is not mixed)
    config.loss.support = "full"  # tokens that L_distill sums over; or "teacher_top_k", "student_top_k", "union_top_k"
    config.loss.top_k = 256  # k of these supports, in tokens
    config.loss.remainder = "renormalise"  # treatment of the probability outside the support; or "tail", or "raw"
    config.loss.beta = 0.0  # weight of the anchor, nats per nat
    config.loss.beta_ramp = 0  # steps in which beta rises from 0 to its value
    # Target of q_c; or "ema", "teacher_bare", "joint", "symmetric", "teacher", "handover" (ctxjax/distill/anchors.py).
    config.loss.anchor = "bare"
    # Apply the anchor only every anchor_every steps. Its weight is multiplied by anchor_every, so the average weight is
    # unchanged.
    config.loss.anchor_every = 1
    # Where the anchor applies: "none", everywhere; "token", at tokens for which q_x and the teacher have the same most
    # likely token; "response", in responses with enough such tokens.
    config.loss.gate = "none"
    config.loss.gate_threshold = 0.9  # share of such tokens that the gate "response" needs
    config.loss.mu = 0.0  # weight of retention, nats per nat
    config.loss.mu_ramp = 0  # steps in which mu rises from 0 to its value
    config.loss.reference = 0.0  # weight of KL(q_x || teacher without context), nats per nat
    config.loss.clip = 0.0  # upper limit of L_distill per token, in nats; 0: no limit
    config.loss.skip_first = 0  # the first response tokens that are not trained on
    config.loss.masked_ids = ()  # token ids that are not trained on
    config.loss.drop_truncated = False  # do not train on responses truncated at the length limit
    config.loss.teacher = "frozen"  # or "ema", as the target of distillation alone: the moving average of the student
    config.loss.ema_decay = 0.99  # decay per step of that average and of the "ema" anchor
    config.loss.on_policy_fraction = 1.0  # probability of a step on the student's samples; else on the teacher's
    config.loss.off_policy_steps = 0  # first steps, on the teacher's samples
    config.loss.averaging = "token_mean"  # or "sequence_mean"
    config.loss.chunk = 128  # response columns whose logits exist at the same time

    config.optim = ConfigDict()  # AdamW
    config.optim.lr = 5e-6  # peak learning rate
    config.optim.schedule = "constant"  # or "cosine", to 0 at the last step
    config.optim.warmup_steps = 0  # steps in which the rate rises linearly; the last of them has the peak rate
    config.optim.b1 = 0.9  # AdamW's decay of the first moment
    config.optim.b2 = 0.999  # AdamW's decay of the second moment
    config.optim.weight_decay = 0.01  # of AdamW
    config.optim.clip = 1.0  # upper limit of the gradient's global norm

    config.train = ConfigDict()  # the loop
    config.train.steps = 50  # optimiser steps, each on one rollout batch
    config.train.batch_size = 128  # questions in a global batch, with one response each; in a game, episodes of a step
    config.train.micro_batches = 1  # micro-batches of a batch; their gradients are accumulated, which saves memory
    # Rows with other contexts in a batch (in a game, episodes), if mu > 0; 0: batch_size.
    config.train.retention_rows = 0
    config.train.save_every = 50  # steps between checkpoints; the last step and the best step so far are always saved
    config.train.keep = 2  # number of latest checkpoints to keep, in addition to the best one
    config.train.log_every = 1  # steps between rows of metrics.jsonl

    config.eval = ConfigDict()  # evaluation, on dev while training and on test at the end
    config.eval.every = 10  # steps between evaluations on the dev split; 0: never
    config.eval.batch_size = 256  # questions decoded at the same time
    # Views to ask besides those without and with the context, where the task has them. Fewer make an evaluation
    # cheaper; () leaves out obedience, too.
    config.eval.views = ("empty", "other", "paraphrase", "unrelated")
    # What to measure besides, without grading, for one more pass each (docs/training.md): "trace_gap", how likely the
    # teacher's responses are without the context; "drift", how far the student is from the base on everyday questions.
    config.eval.meters = ()
    config.eval.temperature = 0.0  # 0: greedy
    # Responses per question and view; more than one needs a temperature above 0. Harm is then reported together with
    # its floor: how often two samples of the same view disagree.
    config.eval.samples = 1
    config.eval.top_k = 0  # 0: off
    config.eval.top_p = 1.0  # 1: off
    config.eval.bootstrap = 2000  # resamples of a bootstrap interval (harm above its floor; rates have Wilson's)
    # Dev metric that selects the best checkpoint, which is kept and evaluated on the test split, as the last step is.
    # Higher is better; with a minus sign ("-distill") lower is better. Of equal steps the later one is taken.
    config.eval.select = "both_correct"

    config.extract = ConfigDict()  # lessons that the model writes from its own traces: python -m ctxjax.extract
    config.extract.seed = config.get_oneway_ref("seed")  # of the choice of training questions, and of all sampling
    config.extract.candidates = 16  # contexts to choose among, each from traces of its own
    config.extract.traces = 8  # training questions (in a game, episodes) for a candidate
    config.extract.limit = 2048  # most tokens of a context; beyond it the oldest lessons are dropped
    config.extract.max_tokens = 512  # most tokens of a response with lessons, end token included
    # The trace of a question, from {question} and {response}; that of a game is made by its task.
    config.extract.solution = "Problem:\n{question}\n\nYour solution:\n{response}"
    # What asks for lessons from a {trace}. Lines of the response that begin as shown here are kept.
    config.extract.request = (
        "{trace}\n\nThis is what happened. What did you learn from it that helps with other problems of this kind? "
        'Write general lessons, each in one line that begins with "- EXPERIENCE ITEM:".'
    )
    config.extract.budget = 2000  # answers to dev questions (in a game, episodes) to choose among the candidates
    config.extract.level = 0.05  # the best candidate must beat the empty context with a p-value below this

    # Warnings of a run, each given once (ctxjax/monitoring/alarms.py). A threshold of 0 switches its alarm off.
    config.alarms = ConfigDict()
    # Alarms that end the run. Their names: "not_finite" (loss or gradient; such a step is skipped), "no_end" (no
    # response ends), and the thresholds below.
    config.alarms.stop = ("not_finite",)
    config.alarms.patience = 3  # consecutive steps beyond the threshold that raise an alarm
    config.alarms.untrained = 0.5  # share of responses without a token that is trained on
    config.alarms.logprob_gap = 0.05  # difference between sampling and scoring, mean nats per token
    config.alarms.truncated = 0.5  # share of responses truncated at the length limit
    config.alarms.repetition = 0.3  # share of 8-token sequences that occurred before in the same response
    config.alarms.no_distillation = 1e-6  # L_distill, nats per token; below it there is nothing to learn: no context?
    config.alarms.parse_rate = 0.3  # fall of the share of readable dev answers from its best value
    config.alarms.agreement = 0.2  # fall of the smoothed top1_agreement of student and teacher from its best value
    config.alarms.context_use = 0.2  # fall of Acc_xc on dev from its best value, which may be the base's

    # Projects that get what metrics.jsonl gets, too; "": off. Packages: pip install "ctxjax[wandb]" or "[trackio]".
    config.logging = ConfigDict()
    config.logging.wandb = ""  # project of Weights & Biases
    config.logging.trackio = ""  # project of Trackio, kept on this machine unless TRACKIO_SPACE_ID names a Space

    # The arms: name -> changes to config.loss, and lr, if its optim.lr is another one. All start from the same base,
    # seed and data order.
    config.arms = ConfigDict()
    config.arms.opcd = ConfigDict({"beta": 0.0, "mu": 0.0})
    config.arms.off_policy = ConfigDict({"divergence": "forward_kl", "on_policy_fraction": 0.0})
    config.arms.sft = ConfigDict({"divergence": "cross_entropy", "on_policy_fraction": 0.0})
    config.arms.opcd_anchored = ConfigDict({"beta": 0.5, "mu": 0.0})
    config.arms.opcd_handover = ConfigDict({"beta": 0.5, "mu": 0.0, "anchor": "handover"})
    config.arms.opcd_retained = ConfigDict({"beta": 0.5, "mu": 1.0})
    # The arms to run, in this order. A later start in the same workdir may add arms; those that are finished stay.
    config.run_arms = ("opcd", "opcd_anchored", "opcd_retained")

    config.rules = ConfigDict()  # task rules: the built-in world of substitution tables
    config.policy = ConfigDict()  # task policy: a world of contexts of four rules, of which a question needs one or two
    config.scratch = ConfigDict()  # task scratch: a world of tables that may suggest a draft, which nothing needs
    for section in (config.rules, config.policy, config.scratch):
        section.seed = config.get_oneway_ref("seed")  # of the world: tables, questions, splits
        section.context_index = 0  # the table or policy to internalize, 0 to 7
        section.train_questions = 4096  # questions to train on
        section.dev_questions = 128  # questions held out to watch the run
        section.test_questions = 512  # questions held out for the result
        section.empty_share = 0.0  # of the base's rows without a context, the share with an empty context block

    config.records = ConfigDict()  # for all data files: treatment of rows that cannot be used
    # Kinds of bad rows to leave out and count; a row of another kind is an error that names the row. Kinds:
    # "unreadable" (not valid JSON, CSV or UTF-8), "missing" (no column, null, empty), "not_text", "huge", "label" (not
    # a valid value), "duplicate", "conflict" (one question with two answers). The tasks medical, safety, math, hints
    # and self_study always leave out and count questions of the last two kinds, without a limit.
    config.records.skip = ("duplicate",)
    config.records.max_skipped = 100  # most rows to leave out; more are an error
    config.records.max_text = 1_000_000  # characters; longer texts are "huge"

    config.qa_jsonl = ConfigDict()  # task qa_jsonl: questions in a file of rows
    config.qa_jsonl.question = "question"  # column
    config.qa_jsonl.reference = "answer"  # column
    # Column with a chat in place of a question, a list of {"role", "content"}: its last user message is the question,
    # and a response after it the reference. With context_column of the same name its system message is the context.
    config.qa_jsonl.messages = ""
    # What the teacher alone reads, made of each row (in place of a context below). A text with columns in braces, such
    # as "Notes: {notes.text}", is the context; with the question's column, as in "{question} Its answer: {answer}", it
    # is the teacher's user message in place of the question.
    config.qa_jsonl.context_template = ""
    config.qa_jsonl.teacher_messages = ""  # or a column with the teacher's whole chat, of any turns that it has
    # "numeric" compares the last number; or "exact", "math", "letter", "yes_no"; "short": the reference in a few
    # words or a sentence; "overlap": half of the words of a reply (F1).
    config.qa_jsonl.grading = "numeric"
    # A file of the same columns and a column "context": questions under other contexts, with what is right there. Used
    # for retention and obedience in place of the built-in other contexts. Every second context is held out.
    config.qa_jsonl.other_rows = ""
    config.qa_jsonl.dev_questions = 64  # held out by a hash of the question
    config.qa_jsonl.test_questions = 64  # held out by a hash of the question

    config.medical = ConfigDict()  # task medical: multiple choice as in MedMCQA, a letter in <answer> tags
    config.medical.first_label = 0  # value of cop for option A: 0 in the files on the Hub, 1 in the authors' files
    config.medical.ask_format = True  # the question asks for the tags; otherwise only a context can

    config.safety = ConfigDict()  # task safety: offensive and hateful language, yes or no in <answer> tags
    config.safety.path = ""  # folder with the published files of the sets; ctxjax/data/safety_sets.py names them
    config.safety.sets = ("tweeteval", "hatecheck", "ethos")  # the sets to pool
    config.safety.ask_format = True  # the question asks for the tags

    config.math = ConfigDict()  # task math: problems as in GSM8K and DAPO-Math, graded by the value of the answer
    config.math.ask_format = True  # the question asks for a boxed answer

    config.hints = ConfigDict()  # task hints: rows of any file, each with its own context
    config.hints.question = "question"  # column
    config.hints.reference = "answer"  # column
    config.hints.hint = "answer"  # column with the text that only the teacher sees
    config.hints.template = "A solution that may help, which the user does not see:\n\n{hint}"  # the context
    config.hints.grading = "math"  # as qa_jsonl.grading

    config.handbook = ConfigDict()  # task handbook: a document of twelve invented facts, for any model
    config.handbook.seed = config.get_oneway_ref("seed")  # of the subject and all values: another one, another document
    config.handbook.subject = "place"  # what the document is about; or "company", "product"
    config.handbook.style = "list"  # or "prose", "table", "rules"
    # Length of the document, in about as many tokens; statements about other subjects fill it up. 0: the facts alone,
    # which have 130 (table) to 220 tokens (rules).
    config.handbook.tokens = 0
    config.handbook.train_questions = 0  # at most; 0: all, 216
    config.handbook.dev_questions = 0  # at most; 0: all, 24
    config.handbook.test_questions = 0  # at most; 0: all, 192

    config.style = ConfigDict()  # task style: a system prompt that demands a way to reply, with questions of its own
    config.style.demand = "pirate"  # or "french", "json", "exclaim", "short", "sign": ctxjax/data/styles.jsonl

    config.self_study = ConfigDict()  # task self_study: a context and no questions; a model writes them
    # The file of the questions; "": a run writes one into the cache, which can be edited and given here.
    config.self_study.path = ""
    config.self_study.cache = config.base.get_oneway_ref("cache")  # folder of the written questions
    # The model that writes the questions and answers them with the context: a folder or a Hub id. With another teacher
    # than the student, name the teacher.
    config.self_study.writer = config.model.get_oneway_ref("path")
    config.self_study.questions = 256  # to write, of all splits
    config.self_study.follow_up_share = 0.2  # share of the questions that are second turns, after a question and reply
    config.self_study.unrelated_share = 0.1  # share of the requests for questions about anything else
    config.self_study.temperature = 0.8  # of the questions; replies are greedy
    config.self_study.longest_question = 48  # tokens; longer drafts are thrown away
    config.self_study.longest_reference = config.rollout.get_oneway_ref("max_tokens")  # tokens; as for questions
    config.self_study.seed = config.get_oneway_ref("seed")  # of the requests and of the drafts
    # What the context demands of every reply, if it can be checked: a name of docs/contexts.md and, after a space, its
    # argument, such as "starts_with Arr"; "": replies are compared with the writer's.
    config.self_study.check = ""

    config.text_game = ConfigDict()  # task text_game: a game of several turns, for any model (ctxjax/games)
    config.text_game.game = "frozenlake"  # or "sokoban", "ice_slide", "grid_walk"
    config.text_game.size = 4  # rows and columns
    config.text_game.pieces = 3  # holes (frozenlake, grid_walk), boxes (sokoban) or rocks (ice_slide)
    config.text_game.turns = 7  # most responses in an episode; all boards can be won within them
    config.text_game.seed = config.get_oneway_ref("seed")  # of the choice of boards and of their order
    config.text_game.train_questions = 0  # boards; 0: all, if they are few enough to be listed
    config.text_game.dev_questions = 0  # boards held out to watch the run; 0: as above
    config.text_game.test_questions = 0  # boards held out for the result; 0: as above

    config.tiny_safety = ConfigDict()  # task tiny_safety: the texts of safety as a world with its own base
    config.tiny_safety.path = config.safety.get_oneway_ref("path")  # as safety.path
    config.tiny_safety.seed = config.get_oneway_ref("seed")  # of the contexts and of which ones are held out
    config.tiny_safety.vocabulary = 4096  # tokens of the byte-level BPE, which is trained on the texts
    config.tiny_safety.longest = 32  # most tokens of a text; longer ones are left out and counted
    config.tiny_safety.train_questions = 0  # at most; 0: all
    config.tiny_safety.dev_questions = 256  # at most; 0: all
    config.tiny_safety.test_questions = 0  # at most; 0: all

    config.tiny_grid = ConfigDict()  # task tiny_grid: a game of several turns, with a base of its own
    config.tiny_grid.seed = config.get_oneway_ref("seed")  # of the legends and of the order of boards
    config.tiny_grid.context_index = 0  # the legend to internalize, 0 to 7
    config.tiny_grid.context_file = ""  # lessons in place of the legend, such as experience.txt; "": the legend
    config.tiny_grid.size = 3  # rows and columns of the grid
    config.tiny_grid.holes = 2  # holes in the grid
    config.tiny_grid.turns = 5  # most responses in an episode
    config.tiny_grid.train_questions = 0  # boards; 0: all
    config.tiny_grid.dev_questions = 0  # boards held out to watch the run; 0: all
    config.tiny_grid.test_questions = 0  # boards held out for the result; 0: all
    config.tiny_grid.empty_share = 0.0  # of the base's rows without a legend, the share with an empty context block

    for section in (config.qa_jsonl, config.medical, config.math, config.hints):
        # A JSONL, Parquet or CSV file, a pattern of files, or files of a Hub data set: "org/name:PATTERN" or
        # "org/name@revision:PATTERN".
        section.path = ""
        section.limit = 0  # number of first rows to read of each file; 0: all
    for section in (config.medical, config.math, config.hints):
        section.test_path = ""  # files of the test questions; "": a fifth of the questions of path
    for section in (config.medical, config.safety, config.math, config.hints, config.style, config.self_study):
        section.train_questions = 0  # at most; 0: all
        section.dev_questions = 128  # at most, of the tenth that is held out by a hash of the question; 0: all
        section.test_questions = 500  # at most; 0: all

    # The context to internalize: set one of context, context_file, context_files and context_column.
    for section in (config.qa_jsonl, config.medical, config.safety, config.math, config.self_study, config.text_game):
        section.context = ""  # the text itself
        section.context_file = ""  # a text file
        section.context_files = ()  # several text files; context_seed and a row's id decide which one the row gets
        section.context_seed = config.get_oneway_ref("seed")  # of the choice among context_files
    for section in (config.qa_jsonl, config.medical, config.math):
        section.context_column = ""  # a column of the data with each row's own context
    for section in (
        config.qa_jsonl, config.medical, config.safety, config.math, config.hints, config.style, config.self_study,
        config.text_game,
    ):  # fmt: skip
        # Other contexts, for retention and to measure obedience: "builtin", the 72 contexts of
        # ctxjax/data/other_contexts.jsonl, or a file of the same form; "": none. Every second one is held out from
        # training.
        section.other_contexts_file = "builtin"
    return config
