// The scheduler of the emulated threads, and the few functions of the CUDA runtime that the library calls.
#include "emulator.h"

#include <cstdlib>
#include <numeric>

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
Block* running = nullptr;

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

unsigned next_seed() {
  static std::mt19937 seeds(setting("EMULATOR_SEED", 0));
  return seeds();
}

std::vector<std::unique_ptr<Fiber>>& pool() {
  static std::vector<std::unique_ptr<Fiber>> fibers;  // their stacks are used again
  return fibers;
}

}  // namespace

Block& block() { return *running; }

Block::Block(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed)
    : grid(grid), size(block), shared(shared_bytes), random_(seed) {}

void Block::run(dim3 at, const std::function<void()>& body) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  index = at, body_ = &body, alive_ = count;
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xff));
  meetings_.assign((count + kWarp - 1) / kWarp, {});
  in_meeting_.assign(meetings_.size(), {});
  barriers_.clear();
  fibers_.swap(pool());
  while (static_cast<int>(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
  ready_.resize(count);
  std::iota(ready_.begin(), ready_.end(), 0);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers_[i];
    fiber.stack.resize(kStack);
    fiber.started = fiber.ended = false;
    fiber.groups.assign(1, {});
    fiber.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
  }
  while (!ready_.empty() && error_.empty()) {
    const size_t choice = random_() % ready_.size();
    const int thread = ready_[choice];
    ready_[choice] = ready_.back(), ready_.pop_back();
    resume(thread);
  }
  fibers_.swap(pool());
  if (error_.empty() && alive_) {
    error_ = std::to_string(alive_) + " threads wait for ever, in";
    for (size_t w = 0; w < meetings_.size(); ++w) {
      if (!in_meeting_[w].empty()) error_ += std::string(" ") + meetings_[w].name + " (warp " + std::to_string(w) + ")";
    }
    for (const auto& [number, barrier] : barriers_) {
      if (barrier.waiting.empty()) continue;
      error_ += " barrier " + std::to_string(number) + " (" + std::to_string(barrier.waiting.size()) + " of " +
                std::to_string(barrier.count) + ")";
    }
  }
  if (!error_.empty()) throw std::runtime_error("emulator: " + error_);
}

void Block::enter() {
  Block& self = *running;
  (*self.body_)();
  self.leave();
}

void Block::resume(int thread) {
  current_ = thread;
  Fiber& fiber = *fibers_[thread];
  if (_setjmp(scheduler_)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Block::enter, 0);
  setcontext(&fiber.context);
}

void Block::pause() {
  if (!_setjmp(fiber().place)) _longjmp(scheduler_, 1);
}

void Block::fail(const std::string& what) {
  error_ = what;
  _longjmp(scheduler_, 1);
}

void Block::leave() {
  fiber().ended = true;
  --alive_;
  const int warp = current_ / kWarp;
  if (meetings_[warp].count && meetings_[warp].count == alive_in_warp(warp)) {
    if (std::strcmp(meetings_[warp].name, "__syncwarp")) {
      fail("a thread ended while its warp waits in " + std::string(meetings_[warp].name));
    }
    dismiss(warp);
  }
  const auto found = barriers_.find(0);
  if (found != barriers_.end() && !found->second.waiting.empty() &&
      static_cast<int>(found->second.waiting.size()) == alive_) {
    release(found->second);
  }
  _longjmp(scheduler_, 1);
}

int Block::alive_in_warp(int warp) const {
  int count = 0;
  const int end = std::min<int>((warp + 1) * kWarp, size.x * size.y * size.z);
  for (int i = warp * kWarp; i < end; ++i) count += !fibers_[i]->ended;
  return count;
}

void Block::meet(const char* name, void* operands, size_t bytes,
                 const std::function<void(void* (&)[kWarp])>& compute) {
  const int warp = current_ / kWarp;
  Meeting& meeting = meetings_[warp];
  if (meeting.count && (std::strcmp(meeting.name, name) || meeting.bytes != bytes)) {
    fail("lanes of a warp part: one is in " + std::string(meeting.name) + ", another in " + name);
  }
  meeting.name = name, meeting.bytes = bytes;
  meeting.operands[lane()] = operands;
  if (++meeting.count < alive_in_warp(warp)) {
    in_meeting_[warp].push_back(current_);
    pause();
    return;
  }
  compute(meeting.operands);
  dismiss(warp);
  ready_.push_back(current_);  // any lane may be the first to go on
  pause();
}

void Block::dismiss(int warp) {
  ready_.insert(ready_.end(), in_meeting_[warp].begin(), in_meeting_[warp].end());
  in_meeting_[warp].clear();
  meetings_[warp] = {};
}

void Block::release(Barrier& barrier) {
  ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// threads: 0 for all that have not ended.
void Block::wait(int number, int threads) {
  Barrier& barrier = barriers_[number];
  const int expected = threads ? threads : alive_;
  if (!barrier.waiting.empty() && threads && barrier.count != expected) {
    fail("barrier " + std::to_string(number) + " is waited for by " + std::to_string(barrier.count) + " and by " +
         std::to_string(expected) + " threads");
  }
  barrier.count = expected;
  barrier.waiting.push_back(current_);
  if (static_cast<int>(barrier.waiting.size()) == expected) release(barrier);
  pause();
}

void Launch::run(const std::function<void()>& body) const {
  std::mt19937 random(next_seed());
  Block here(grid, size, bytes, random());
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  Block* before = running;
  running = &here;
  try {
    for (const unsigned i : order) here.run(dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)), body);
  } catch (...) {
    running = before;
    throw;
  }
  running = before;
}

}  // namespace emulator

extern "C" {

// An H200 but for EMULATOR_MULTIPROCESSORS.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::setting("EMULATOR_MULTIPROCESSORS", 132) : 232448;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "no error"; }
int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // extern "C"
