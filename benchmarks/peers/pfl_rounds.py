"""Apple's pfl: FederatedAveraging on the simulated backend. pfl_rounds.py ROUNDS DATA MODEL K
THREADS
"""

import os
import sys
import time

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import stepping
import torch
import torch_work
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

num_rounds, path, model, num_sampled, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
images, labels = torch_work.load(path)


class Net(torch_work.MODELS[model]):
  def loss(self, x, y, eval=False):
    self.eval() if eval else self.train()
    return torch.nn.functional.cross_entropy(self(x), y)

  def metrics(self, x, y, eval=True):
    return {"loss": Weighted(float(self.loss(x, y, eval)) * len(y), len(y))}


class Stepping(TrainingProcessCallback):
  """Waits before each round, and tells what it took."""

  def start(self):
    stepping.wait()
    self.wall, self.cpu = time.perf_counter(), time.process_time()

  def on_train_begin(self, *, model):
    stepping.ready("pfl", "torch")
    self.start()
    return Metrics()

  def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
    stepping.answer(time.perf_counter() - self.wall, time.process_time() - self.cpu)
    self.start()
    return False, Metrics()


net = Net()
users = get_user_sampler("minimize_reuse", list(range(len(images))))
FederatedAveraging().run(
  algorithm_params=NNAlgorithmParams(
    central_num_iterations=int(num_rounds),
    evaluation_frequency=10**6,
    train_cohort_size=int(num_sampled),
    val_cohort_size=0,
  ),
  backend=SimulatedBackend(
    training_data=FederatedDataset(
      lambda u: Dataset([images[u], labels[u]], user_id=str(u)), users
    ),
    val_data=None,
    postprocessors=[WeightByDatapoints()],
  ),
  model=PyTorchModel(
    net,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
  ),
  model_train_params=NNTrainHyperParams(
    local_num_epochs=1, local_learning_rate=torch_work.RATE, local_batch_size=torch_work.BATCH
  ),
  model_eval_params=NNEvalHyperParams(local_batch_size=64),
  callbacks=[Stepping()],
)
