// SPDX-License-Identifier: Apache-2.0
// A service manager for one daemon, where there is no systemd: `flashd-keeper SOCKET COMMAND...`
//
// It keeps the descriptors that the daemon stores with it, and restarts a daemon that fails, with all of them.
// The daemon sees no difference: NOTIFY_SOCKET, FDSTORE=1, BARRIER=1 and WATCHDOG=1 as in sd_notify(3), LISTEN_FDS and
// LISTEN_FDNAMES as in sd_listen_fds(3). It ends when the daemon exits with status 0, and after SIGTERM and SIGINT,
// which it passes on as SIGINT. It then closes the descriptors, which ends the engines, and kills their remnants.
// A daemon that was never ready is not restarted.

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

namespace {

constexpr std::size_t kMaxKept = 4096;     // descriptors, as FileDescriptorStoreMax= of a unit
constexpr std::size_t kMaxMessage = 4096;  // bytes
constexpr std::size_t kMaxSent = 253;      // descriptors in one message (SCM_MAX_FD)
constexpr int kFirstHanded = 3;            // SD_LISTEN_FDS_START
constexpr std::size_t kMaxStarts = 5;      // of which each is less than ...
constexpr double kStartsWithin_s = 60.0;   // ... this after the one that was so many before
constexpr double kReadyWithin_s = 60.0;    // as TimeoutStartSec=
constexpr double kStopWithin_s = 60.0;     // as TimeoutStopSec=
constexpr double kWatchdog_s = 30.0;       // as WatchdogSec=
constexpr double kEnginesEndWithin_s = 10.0;
constexpr int kLook_ms = 200;  // how often we look whether they have
constexpr int kRestart = 75;   // exit status of a daemon that wants to be started again

double now_s() {
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / 1e9;
}

[[gnu::format(printf, 1, 2)]] void say(const char* format, ...) {
    char line[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(line, sizeof line, format, values);
    va_end(values);
    std::fprintf(stderr, "flashd-keeper: %s\n", line);
}

struct StoredDescriptor {
    std::string name;
    int fd;
};

class Keeper {
  public:
    Keeper(const char* socket_path, char** command) : socket_path_(socket_path), command_(command) {}

    // Returns the exit status of flashd-keeper.
    int run() {
        if (!listen()) return 1;
        begin();
        while (pid_ != 0) {
            pollfd waits[] = {{signals_, POLLIN, 0}, {socket_, POLLIN, 0}};
            poll(waits, 2, static_cast<int>(std::max(0.0, hangs_at_s() - now_s()) * 1000) + 1);
            while (receive()) {
            }
            handle_signals();
            end_what_hangs();
        }
        end_the_rest();
        return status_;
    }

  private:
    bool listen() {
        sigset_t handled;
        sigemptyset(&handled);
        for (int number : {SIGCHLD, SIGTERM, SIGINT}) sigaddset(&handled, number);
        sigprocmask(SIG_BLOCK, &handled, &mask_before_);
        signals_ = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
        rlimit files{};
        if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
            files.rlim_cur = files.rlim_max;
            setrlimit(RLIMIT_NOFILE, &files);
        }
        // Engines outlive the daemon that forked them: from then on they are our children.
        prctl(PR_SET_CHILD_SUBREAPER, 1);
        socket_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        if (std::strlen(socket_path_) >= sizeof address.sun_path) {
            say("%s is too long for a socket", socket_path_);
            return false;
        }
        std::strcpy(address.sun_path, socket_path_);
        const int yes = 1;
        if (bind(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
            setsockopt(socket_, SOL_SOCKET, SO_PASSCRED, &yes, sizeof yes) != 0) {
            say("%s: %s", socket_path_, std::strerror(errno));
            return false;
        }
        return true;
    }

    // Starts the daemon with all descriptors that are kept for it.
    void begin() {
        starts_.push_back(now_s());
        is_ready_ = false;
        sign_of_life_ = now_s();
        pid_ = fork();
        if (pid_ == 0) become_daemon();
        if (pid_ < 0) {
            say("no process for flashd: %s", std::strerror(errno));
            pid_ = 0;
            status_ = 1;
        }
    }

    [[noreturn]] void become_daemon() {
        std::string names;
        std::vector<int> moved;
        const int above = kFirstHanded + static_cast<int>(kept_.size());
        for (const StoredDescriptor& kept : kept_) {
            names += (names.empty() ? "" : ":") + kept.name;
            moved.push_back(fcntl(kept.fd, F_DUPFD_CLOEXEC, above));
        }
        for (std::size_t index = 0; index < moved.size(); ++index)
            dup2(moved[index], kFirstHanded + static_cast<int>(index));
        setenv("NOTIFY_SOCKET", socket_path_, 1);
        setenv("WATCHDOG_USEC", std::to_string(static_cast<long>(kWatchdog_s * 1e6)).c_str(), 1);
        setenv("LISTEN_PID", std::to_string(getpid()).c_str(), 1);
        setenv("LISTEN_FDS", std::to_string(kept_.size()).c_str(), 1);
        setenv("LISTEN_FDNAMES", names.c_str(), 1);
        for (const char* of_another : {"WATCHDOG_PID", "JOURNAL_STREAM"}) unsetenv(of_another);
        sigprocmask(SIG_SETMASK, &mask_before_, nullptr);
        execvp(command_[0], command_);
        say("cannot run %s: %s", command_[0], std::strerror(errno));
        _exit(127);
    }

    // Reads one message of the daemon; returns false if there is none.
    bool receive() {
        char text[kMaxMessage + 1];
        alignas(cmsghdr) char control[CMSG_SPACE(sizeof(ucred)) + CMSG_SPACE(kMaxSent * sizeof(int))];
        iovec into{text, kMaxMessage};
        msghdr message{};
        message.msg_iov = &into;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        const ssize_t length = recvmsg(socket_, &message, MSG_CMSG_CLOEXEC);
        if (length < 0) return false;
        std::vector<int> fds;
        pid_t sender = 0;
        for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
            if (part->cmsg_level != SOL_SOCKET) continue;
            if (part->cmsg_type == SCM_CREDENTIALS) {
                ucred who{};
                std::memcpy(&who, CMSG_DATA(part), sizeof who);
                sender = who.pid;
            } else if (part->cmsg_type == SCM_RIGHTS) {
                fds.resize((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
                std::memcpy(fds.data(), CMSG_DATA(part), fds.size() * sizeof(int));
            }
        }
        if (sender == pid_) obey(std::string_view(text, static_cast<std::size_t>(length)), fds);
        for (int fd : fds) close(fd);  // of a barrier, which waits for that, or of somebody else
        return true;
    }

    // Removes the descriptors that it keeps from `fds`.
    void obey(std::string_view text, std::vector<int>& fds) {
        std::string name = "stored";
        bool is_to_keep = false, is_to_forget = false;
        while (!text.empty()) {
            const std::string_view line = text.substr(0, text.find('\n'));
            text.remove_prefix(std::min(line.size() + 1, text.size()));
            if (line.starts_with("FDNAME=")) name = line.substr(7);
            if (line == "FDSTORE=1") is_to_keep = true;
            if (line == "FDSTOREREMOVE=1") is_to_forget = true;
            if (line == "WATCHDOG=1") sign_of_life_ = now_s();
            if (line == "STOPPING=1") {
                is_ready_ = false;
                sign_of_life_ = now_s();
            }
            if (line == "READY=1") {
                is_ready_ = was_ever_ready_ = true;
                sign_of_life_ = now_s();
            }
        }
        if (is_to_forget) {
            std::erase_if(kept_,
                          [&](const StoredDescriptor& kept) { return kept.name == name && close(kept.fd) == 0; });
        } else if (is_to_keep && kept_.size() + fds.size() <= kMaxKept && name.find(':') == std::string::npos) {
            for (int fd : fds) kept_.push_back({name, fd});
            fds.clear();
        }
    }

    void handle_signals() {
        signalfd_siginfo got{};
        while (read(signals_, &got, sizeof got) == sizeof got) {
            if (got.ssi_signo == SIGCHLD || is_ending()) continue;
            ending_since_ = now_s();
            if (pid_ != 0) kill(pid_, SIGINT);
        }
        int status = 0;
        for (pid_t pid = 0; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
            if (pid == pid_) daemon_ended(status);
        }
    }

    void daemon_ended(int status) {
        while (receive()) {  // what it said before it went
        }
        pid_ = 0;
        status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (status_ == 0 || is_ending() || !was_ever_ready_) return;
        if (status_ == kRestart) {
            starts_.clear();
            begin();
            return;
        }
        if (starts_.size() >= kMaxStarts && now_s() - starts_[starts_.size() - kMaxStarts] < kStartsWithin_s) {
            say("flashd ended %zu times in %.0f s, last with status %d: it is not started again", kMaxStarts,
                kStartsWithin_s, status_);
            return;
        }
        say("flashd ended with status %d, and is started again", status_);
        begin();
    }

    double hangs_at_s() const {
        if (is_ending()) return ending_since_ + kStopWithin_s;
        return sign_of_life_ + (is_ready_ ? kWatchdog_s : kReadyWithin_s);
    }

    void end_what_hangs() {
        if (pid_ == 0 || now_s() < hangs_at_s()) return;
        say("flashd hangs, and is killed");
        kill(pid_, SIGKILL);
        (is_ending() ? ending_since_ : sign_of_life_) = now_s();  // it may take the kernel a while
    }

    // Engines end when their channels are closed. Those that do not are killed, with the processes they leave.
    void end_the_rest() {
        for (const StoredDescriptor& kept : kept_) close(kept.fd);
        unlink(socket_path_);
        const std::string path = socket_path_;
        rmdir(path.substr(0, path.rfind('/')).c_str());  // if the daemon has left nothing there
        const double since = now_s();
        while (waitpid(-1, nullptr, WNOHANG) >= 0) {
            const double waited_s = now_s() - since;
            if (waited_s > kEnginesEndWithin_s) signal_children(SIGKILL);
            pollfd waits{signals_, POLLIN, 0};
            poll(&waits, 1, kLook_ms);
            signalfd_siginfo got{};
            while (read(signals_, &got, sizeof got) == sizeof got) {
            }
        }
    }

    static void signal_children(int number) {
        // Listed by the kernel (proc(5), /proc/pid/task/tid/children).
        FILE* children = std::fopen(("/proc/self/task/" + std::to_string(getpid()) + "/children").c_str(), "re");
        if (children == nullptr) return;
        for (int pid = 0; std::fscanf(children, "%d", &pid) == 1;) kill(pid, number);
        std::fclose(children);
    }

    bool is_ending() const { return ending_since_ > 0; }

    const char* socket_path_;
    char** command_;
    int socket_ = -1;
    int signals_ = -1;
    sigset_t mask_before_{};
    pid_t pid_ = 0;  // the daemon's, while it runs
    int status_ = 0;
    bool is_ready_ = false;
    bool was_ever_ready_ = false;
    double sign_of_life_ = 0;
    double ending_since_ = 0;
    std::vector<double> starts_;
    std::vector<StoredDescriptor> kept_;
};

}  // namespace

int main(int count, char** arguments) {
    if (count < 3) {
        std::fprintf(stderr, "flashd-keeper SOCKET COMMAND...\n");
        return 2;
    }
    return Keeper(arguments[1], arguments + 2).run();
}
